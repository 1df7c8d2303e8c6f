"""Stage 2 of CMG as the paper reads: one mode, one seed, plain PyTorch, top to bottom.

    classifier = extractor (frozen) + head (fine-tuned)        cvae = encoder + decoder + class embedding (all frozen)

    for each batch of IND images x with classes y:
        draw two IND classes i, j and noise z ~ N(0, sigma^2 I) for as many pseudo-OOD images
        mix the embeddings e_i and e_j: a fair coin for each of their dimensions
        decode: x' = decoder(z, mixed embedding)
        one Adam step of the head on loss(head(extractor(x)), y, head(extractor(x')))

Of the head's logits the first K are the IND classes, logit K is the OOD slot, the others are spare: the first public
code gives every task of a kind as many. Cross-entropy of IND images and the energies of the loss are over all of them,
the pseudo-OOD term of CMG-softmax over the first K + 1; a score leaves the spare ones out. The paper has batches of 128
images, 15 epochs, a learning rate of 1e-4, mu 0.1, and sigma 3 for images of 28x28 pixels or 5 for those of 32x32.

No real OOD image is used; OOD images are only scored. `cmg.engine` computes the same, for every mode and seed at once,
in a fraction of the time: it encodes each real image once. The tests hold it to this file, draw for draw.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmg.config import FineTuneConfig
from evaluation.metrics import auroc
from models.main_model import MainModel
from models.vae import ConditionalVAE
from utils import generator

# The options that this file knows; all others must have the method's value. The digits draw from a pool by default,
# which is not the method's: give `pseudo_pool=0` for them.
READS = ("num_ind", "sigma", "epochs", "batch_size", "learning_rate", "mu", "margins", "eval_every")


class Result(NamedTuple):
    """What fine-tuning ended with: the head, m_in and m_out (CMG-energy), AUROC by step."""

    head: nn.Module
    margins: tuple[float, float] | None
    curve: dict[int, float]


# --- pseudo-OOD images ----------------------------------------------------------------------------


def draw(count: int, num_ind: int, z_dim: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random draws for `count` pseudo-OOD images: classes i and j [N], which may be the same, noise and coins
    [N, z_dim]."""
    i, j = torch.randint(num_ind, (2, count), generator=random)
    noise = torch.randn(count, z_dim, generator=random)
    coins = torch.rand(count, z_dim, generator=random) < 0.5
    return i, j, noise, coins


def pseudo_ood(cvae: ConditionalVAE, i: Tensor, j: Tensor, noise: Tensor, coins: Tensor, sigma: float) -> Tensor:
    """Decode noise under class-mixed embeddings: images [N, C, S, S] in [0, 1]."""
    mixed = torch.where(coins, cvae.embed(i), cvae.embed(j))  # [N, z_dim]: each dimension from one class or the other
    return cvae.decode(sigma * noise, mixed)


# --- the two modes --------------------------------------------------------------------------------


def energy(logits: Tensor) -> Tensor:
    """E(x) = -log sum_c exp(logit_c): [B, C] -> [B]. Low where the classifier is sure of some class."""
    return -torch.logsumexp(logits, dim=1)


def softmax_loss(ind_logits: Tensor, labels: Tensor, pseudo_logits: Tensor, num_ind: int) -> Tensor:
    """CMG-softmax: IND images to their class, pseudo-OOD images to the OOD slot, which is logit `num_ind`."""
    slot = torch.full((len(pseudo_logits),), num_ind, device=labels.device)
    return F.cross_entropy(ind_logits, labels) + F.cross_entropy(pseudo_logits[:, : num_ind + 1], slot)


def energy_loss(
    ind_logits: Tensor, labels: Tensor, pseudo_logits: Tensor, m_in: Tensor, m_out: Tensor, mu: float
) -> Tensor:
    """CMG-energy: IND images to their class and below the energy m_in, pseudo-OOD images above the energy m_out.

    CE + mu * [ mean relu(E(x) - m_in)^2 + mean relu(m_out - E(x'))^2 ]
    """
    too_high = F.relu(energy(ind_logits) - m_in)
    too_low = F.relu(m_out - energy(pseudo_logits))
    return F.cross_entropy(ind_logits, labels) + mu * ((too_high**2).mean() + (too_low**2).mean())


def score(logits: Tensor, mode: str, num_ind: int) -> Tensor:
    """OOD score, larger meaning more likely OOD: [B, C] -> [B]. Spare logits are left out."""
    if mode == "CMG-softmax":
        # In fp64: in fp32 the probabilities of confident images round to 0 and lose their order.
        return logits[:, : num_ind + 1].double().softmax(1)[:, num_ind]
    return energy(logits[:, :num_ind])


# --- fine-tuning ----------------------------------------------------------------------------------


class Frozen(NamedTuple):
    """What fine-tuning leaves as it is: images, real or made, go in, features [B, F] come out."""

    classifier: MainModel
    cvae: ConditionalVAE
    config: FineTuneConfig

    @torch.no_grad()
    def real_features(self, images: Tensor) -> Tensor:
        """Features of real images, uint8 [B, C, S, S]."""
        return self.classifier.features(images.float() / 255)

    @torch.no_grad()
    def pseudo_features(self, draws: tuple[Tensor, ...], start: int) -> Tensor:
        """Features of a batch of pseudo-OOD images, whose draws begin at row `start`."""
        stop, device = start + self.config.batch_size, device_of(self.cvae)
        i, j, noise, coins = (drawn[start:stop].to(device) for drawn in draws)
        return self.classifier.features(pseudo_ood(self.cvae, i, j, noise, coins, self.config.sigma))


def margins(head: nn.Module, frozen: Frozen, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """m_in and m_out, taken once, before the first step: the 20th percentile of the energies of the IND training images
    and the 80th of those of as many pseudo-OOD images. So four fifths of either kind are on the wrong side at first."""
    config, count, size = frozen.config, len(images), frozen.config.batch_size
    # `generator` makes a stream of random numbers for each seed and purpose, so that none shifts another.
    draws = draw(count, config.num_ind, frozen.cvae.z_dim, generator(seed, "margins"))
    with torch.no_grad():
        ind = [energy(head(frozen.real_features(part))) for part in images.split(size)]
        pseudo = [energy(head(frozen.pseudo_features(draws, start))) for start in range(0, count, size)]
    m_in, m_out = (
        torch.cat(energies).sort().values[int(quantile * count)]
        for energies, quantile in zip((ind, pseudo), config.margins, strict=True)
    )
    return m_in, m_out


@torch.no_grad()
def evaluate(head: nn.Module, frozen: Frozen, test: Tensor, ood: Tensor, mode: str) -> float:
    """AUROC of the head on IND test images and OOD images, uint8."""
    config = frozen.config
    ind_scores, ood_scores = (
        torch.cat(
            [score(head(frozen.real_features(part)), mode, config.num_ind) for part in images.split(config.batch_size)]
        )
        for images in (test, ood)
    )
    return auroc(ind_scores, ood_scores)


def reference(
    classifier: MainModel,
    cvae: ConditionalVAE,
    images: Tensor,
    labels: Tensor,
    test: Tensor,
    ood: Tensor,
    config: FineTuneConfig,
    mode: str,
    seed: int,
) -> Result:
    """Fine-tune a copy of the classifier's head; evaluate every `config.eval_every` steps and after the last.

    Args:
        classifier, cvae: in eval mode.
        images, labels: IND training images, uint8 [N, C, S, S], and their classes [N].
        test, ood: IND test images and OOD images, uint8.
        mode: "CMG-energy" or "CMG-softmax".

    Raises:
        ValueError: another mode, or an option that is not the method's.
    """
    check(config, mode)
    frozen, size, num_ind = Frozen(classifier, cvae, config), config.batch_size, config.num_ind
    head = copy.deepcopy(classifier.classifier).requires_grad_(True)
    m_in, m_out = margins(head, frozen, images, seed) if mode == "CMG-energy" else (None, None)
    optimizer = torch.optim.Adam(head.parameters(), config.learning_rate)
    step, curve = 0, {}
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator(seed, "order", epoch)).to(images.device)
        draws = draw(len(images), num_ind, cvae.z_dim, generator(seed, "pseudo", epoch))
        for start in range(0, len(images), size):
            if step % config.eval_every == 0:
                curve[step] = evaluate(head, frozen, test, ood, mode)
            rows = order[start : start + size]
            ind_logits = head(frozen.real_features(images[rows]))
            pseudo_logits = head(frozen.pseudo_features(draws, start))
            if mode == "CMG-energy":
                loss = energy_loss(ind_logits, labels[rows], pseudo_logits, m_in, m_out, config.mu)
            else:
                loss = softmax_loss(ind_logits, labels[rows], pseudo_logits, num_ind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    curve[step] = evaluate(head, frozen, test, ood, mode)
    return Result(head, None if m_in is None else (m_in.item(), m_out.item()), curve)


def check(config: FineTuneConfig, mode: str) -> None:
    """Raise `ValueError` for another mode, or an option that is not the method's."""
    if mode not in ("CMG-energy", "CMG-softmax"):
        raise ValueError(f"mode is {mode}, expected CMG-energy or CMG-softmax")
    for field in fields(config):
        if field.name not in READS and getattr(config, field.name) != field.default:
            raise ValueError(f"{field.name} is {getattr(config, field.name)}, expected the method's {field.default}")


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
