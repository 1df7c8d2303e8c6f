"""Stage 2: fine-tune the head against pseudo-OOD images, every mode and seed in one pass.

The extractor is frozen, in eval mode and sees no augmentation, so the features of all real images are
constants: they come in here, encoded once. Only pseudo-OOD images, fresh in every step, still go through
the networks. They depend on the seed and not on the mode: all modes of a seed share them, as they share the
order of the IND images. Nothing here depends on the OOD sets, which are only scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from evaluation.metrics import accuracy, auroc
from evaluation.scores import SCORES, energy
from models.inference import CHUNK
from models.vae import Codes, ConditionalVAE, Mixing, decode_pseudo_ood, draw_codes
from training.losses import energy_loss, order_statistic, softmax_loss
from utils import Progress, UserError, autocast, check_memory, generator


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What decides the result of stage 2, beside the networks and the images. The defaults are the method's.

    Attributes:
        num_ind: IND classes.
        epochs, batch_size, learning_rate: Adam over `epochs` passes of the IND training images; each batch meets
            as many pseudo-OOD images.
        check_every: steps between two evaluations; the first is before the first step, the last after the last.
        sigma: standard deviation of the latents of pseudo-OOD images.
        mixing: of the class embeddings.
        pseudo_batch_size: pseudo-OOD images that meet a batch; as many as IND images where it is None, as in the
            method. The last partial batch meets proportionally fewer.
        mu: weight of the energy terms.
        loss_energy, score_energy: over which logits the energies of the loss and of the score go: "all" or "ind";
            all and ind in the method.
        ind_quantile, pseudo_quantile: of the energies that become the margins m_in and m_out.
        anchor: weight of the squared distance of the head from its start, added to the loss; 0 in the method.
        pseudo_pool: draw from so many pseudo-OOD images made in advance; 0, as in the method, makes fresh ones.
        precision: "fp32" or "bf16", under which networks and heads run; losses and scores are always fp32.
    """

    num_ind: int
    sigma: float
    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 1e-4
    check_every: int = 100
    mixing: Mixing = Mixing()
    pseudo_batch_size: int | None = None
    mu: float = 0.1
    loss_energy: str = "all"
    score_energy: str = "ind"
    ind_quantile: float = 0.2
    pseudo_quantile: float = 0.8
    anchor: float = 0.0
    pseudo_pool: int = 0
    precision: str = "fp32"

    @property
    def energy_logits(self) -> int | None:
        """How many logits, from the first, the energies of the loss go over; None for all."""
        return {"all": None, "ind": self.num_ind}[self.loss_energy]


class Margins(NamedTuple):
    """Energies up to which IND images, and from which pseudo-OOD images, cost nothing: [S], one for each seed."""

    m_in: Tensor
    m_out: Tensor

    def of(self, s: int) -> tuple[float, float]:
        return self.m_in[s].item(), self.m_out[s].item()


@dataclass(frozen=True)
class Mode:
    """A way to fine-tune and score.

    Attributes:
        loss: (IND logits, labels, pseudo-OOD logits, margins, config) -> a loss for each head.
        scores: for each value of `score_energy` the key of `SCORES`.
        uses_margins: whether the loss needs the margins, which are None otherwise.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Margins | None, FineTuneConfig], Tensor]
    scores: dict[str, str]
    uses_margins: bool


MODES: dict[str, Mode] = {
    "CMG-softmax": Mode(
        loss=lambda ind, labels, pseudo, margins, config: softmax_loss(ind, labels, pseudo, config.num_ind),
        scores={"ind": "CMG-softmax", "all": "CMG-softmax"},
        uses_margins=False,
    ),
    "CMG-energy": Mode(
        loss=lambda ind, labels, pseudo, margins, config: energy_loss(
            ind, labels, pseudo, *margins, config.mu, config.energy_logits
        ),
        scores={"ind": "CMG-energy", "all": "CMG-energy over all logits"},
        uses_margins=True,
    ),
}


def score_logits(logits: Tensor, mode: str, config: FineTuneConfig) -> Tensor:
    """OOD scores [...] of logits [..., C] as the mode has them."""
    return SCORES[MODES[mode].scores[config.score_energy]](logits, config.num_ind)


@dataclass(frozen=True)
class FeatureBank:
    """Features [N, F] of the real images, and the labels of those that have some.

    `validation` are IND training images that neither stage trained on; empty where none were kept.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    test: Tensor
    test_labels: Tensor
    ood: dict[str, Tensor]


@dataclass(frozen=True)
class PseudoOOD:
    """Makes the features of pseudo-OOD images.

    Attributes:
        vae: in eval mode.
        features: images [B, C, S, S] in [0, 1] -> features [B, F], of the frozen extractor in eval mode.
    """

    vae: ConditionalVAE
    features: Callable[[Tensor], Tensor]
    num_ind: int
    sigma: float
    precision: str
    device: torch.device
    mixing: Mixing = Mixing()

    def draw(self, count: int, generator: torch.Generator) -> Codes:
        """The random numbers of `count` images. Raises `MemoryShortage` where there is no room for so many."""
        check_memory(
            count * 4 * (4 + 3 * self.vae.z_dim), torch.device("cpu"), f"noise for {count:,} pseudo-OOD images"
        )
        return draw_codes(count, self.num_ind, self.vae.z_dim, generator, self.mixing)

    @torch.no_grad()
    def encode(self, codes: Codes, progress: Progress | None = None) -> Tensor:
        """Features [N, F] of the images of N codes. Raises `MemoryShortage` where there is no room for them."""
        parts, chunk, count = [], CHUNK[self.device.type], len(codes.first)
        with autocast(self.device, self.precision):
            for start in range(0, count, chunk):
                images = decode_pseudo_ood(self.vae, codes.rows(start, start + chunk).to(self.device), self.sigma)
                parts.append(self.features(images.float()).float())
                if start == 0:  # they will be there in parts, as one and among those of all seeds
                    needed = 3 * count * parts[0][0].nbytes
                    check_memory(needed, self.device, f"the features of {count:,} pseudo-OOD images")
                if progress:
                    progress.advance(len(images))
        return torch.cat(parts)


class Check(NamedTuple):
    """One evaluation: of the optimizer step it follows, on the test images and on the validation images."""

    step: int
    accuracy: float
    auroc: dict[str, float]
    validation_auroc: float | None


@dataclass
class Run:
    """What became of one head.

    Attributes:
        curve: the evaluations, in the order of steps.
        last: the head's parameters after the last step.
        validated: those at `validated_step`, the check with the best AUROC of validation images against fresh
            pseudo-OOD images; None where no validation images were kept.
        margins: m_in and m_out, where the mode uses them.
    """

    mode: str
    seed: int
    margins: tuple[float, float] | None
    curve: list[Check] = field(default_factory=list)
    last: dict[str, Tensor] | None = None
    validated: dict[str, Tensor] | None = None
    validated_step: int | None = None


class HeadStack:
    """Copies of a head, trained side by side as one batched computation.

    Attributes:
        leaves: what is optimized, by name: [K, ...] for K copies. Weights are transposed there: the gradient of a
            batched product comes out that way, and to turn it round took longer than the product.
    """

    def __init__(self, head: nn.Module, copies: int):
        self.head = head
        self.start = {name: p.detach() for name, p in head.named_parameters()}
        repeated = {name: p.repeat(copies, *[1] * p.dim()) for name, p in self.start.items()}
        self.leaves = {name: turned(p).contiguous().requires_grad_() for name, p in repeated.items()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, as the head has them: [K, ...]."""
        return {name: turned(leaf) for name, leaf in self.leaves.items()}

    def __call__(self, features: Tensor) -> Tensor:
        """[K, B, F] -> [K, B, C], each copy on its own batch."""
        return vmap(partial(functional_call, self.head))(self.parameters, features).float()

    def distance(self) -> Tensor:
        """Squared distance of each copy from the start: [K]."""
        return sum(((p - self.start[name]) ** 2).flatten(1).sum(1) for name, p in self.parameters.items())

    def view(self, k: int) -> dict[str, Tensor]:
        """The parameters of copy k, which change as training goes on."""
        return {name: turned(leaf.detach())[k] for name, leaf in self.leaves.items()}

    def copy(self, k: int) -> dict[str, Tensor]:
        """The parameters of copy k, as they are now."""
        return {name: p.clone(memory_format=torch.contiguous_format) for name, p in self.view(k).items()}


def turned(parameter: Tensor) -> Tensor:
    """Stacked weights [K, O, I] -> [K, I, O] and back; biases [K, O] as they are."""
    return parameter.mT if parameter.dim() == 3 else parameter


HEAD_CHUNK = 4096  # images at once through a head, whose features may be many


@torch.no_grad()
def head_logits(head: nn.Module, parameters: dict[str, Tensor], features: Tensor) -> Tensor:
    """Logits [N, C] of `head` with the given parameters, in fp32."""
    return torch.cat([functional_call(head, parameters, (part,)) for part in features.split(HEAD_CHUNK)])


def fine_tune(
    head: nn.Module,
    bank: FeatureBank,
    pseudo: PseudoOOD,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
    show_progress: bool = True,
) -> list[Run]:
    """Fine-tune a copy of `head` for every mode and seed; `head` itself stays as it is.

    A run's draws follow from its seed alone, so its result does not depend on what else is tuned beside it, up
    to the rounding of batched products.
    """
    device, count = bank.train.device, len(bank.train)
    stacks = {mode: HeadStack(head, len(seeds)) for mode in modes}
    source = PooledFeatures(pseudo, config, seeds) if config.pseudo_pool else FreshFeatures(pseudo, config, seeds)
    margins = find_margins(head, bank, source, config) if any(MODES[mode].uses_margins for mode in modes) else None
    runs = {
        (mode, s): Run(mode, seed, margins.of(s) if MODES[mode].uses_margins else None)
        for mode in modes
        for s, seed in enumerate(seeds)
    }
    checker = Checker(head, bank, pseudo, config, seeds)
    optimizer = torch.optim.Adam(
        [leaf for stack in stacks.values() for leaf in stack.leaves.values()], config.learning_rate, fused=True
    )
    progress = Progress(config.epochs * count, "stage 2", enabled=show_progress)
    step = 0
    for epoch in range(config.epochs):
        orders = torch.stack([torch.randperm(count, generator=generator(seed, "order", epoch)) for seed in seeds]).to(
            device
        )
        for rows, pseudo_features in zip(
            orders.split(config.batch_size, dim=1), source.batches(epoch, count), strict=True
        ):
            if step % config.check_every == 0:
                checker.check(step, stacks, runs)
            with autocast(device, config.precision):
                loss = _loss(stacks, bank.train[rows], bank.train_labels[rows], pseudo_features, margins, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            progress.advance(
                rows.shape[1], lambda: f"epoch {epoch + 1}/{config.epochs}  loss {loss.item() / len(runs):.4f}"
            )
    checker.check(step, stacks, runs)
    progress.close()
    for (mode, s), run in runs.items():
        run.last = stacks[mode].copy(s)
    return list(runs.values())


def _loss(stacks, ind_features, labels, pseudo_features, margins, config) -> Tensor:
    """Sum of the losses of all heads, whose gradients do not meet: features [S, B, F], labels [S, B]."""
    total = 0
    features, sizes = torch.cat([ind_features, pseudo_features], 1), [ind_features.shape[1], pseudo_features.shape[1]]
    for mode, stack in stacks.items():
        ind_logits, pseudo_logits = stack(features).split(sizes, 1)
        losses = MODES[mode].loss(ind_logits, labels, pseudo_logits, margins, config)
        if config.anchor:
            losses = losses + config.anchor * stack.distance()
        total = total + losses.sum()
    return total


def find_margins(
    head: nn.Module, bank: FeatureBank, source: FreshFeatures | PooledFeatures, config: FineTuneConfig
) -> Margins:
    """The margins, from the energies of the IND training images and of as many pseudo-OOD images (or of the pool),
    under the head as it is before fine-tuning."""
    start = dict(head.named_parameters())

    def energies(features: Tensor) -> Tensor:
        return energy(head_logits(head, start, features)[:, : config.energy_logits])

    m_in = order_statistic(energies(bank.train), config.ind_quantile)
    m_out = [
        order_statistic(energies(features), config.pseudo_quantile) for features in source.for_margins(len(bank.train))
    ]
    return Margins(m_in.expand(len(m_out)).clone(), torch.stack(m_out).clone())


STEPS_PER_CHUNK = 16  # whose pseudo-OOD images are made at once


def pseudo_sizes(config: FineTuneConfig, count: int) -> tuple[int, int]:
    """Pseudo-OOD images for an epoch of `count` IND images, and for each of its batches but the last."""
    size = config.pseudo_batch_size or config.batch_size
    return -(-count * size // config.batch_size), size


class FreshFeatures:
    """New pseudo-OOD images for every step, as the method has it."""

    def __init__(self, pseudo: PseudoOOD, config: FineTuneConfig, seeds: Sequence[int]):
        self.pseudo, self.config, self.seeds = pseudo, config, seeds

    def for_margins(self, count: int):
        """Yield features [count, F] for each seed."""
        progress = Progress(len(self.seeds) * count, "margins")
        for seed in self.seeds:
            yield self.pseudo.encode(self.pseudo.draw(count, generator(seed, "margins")), progress)
        progress.close()

    def batches(self, epoch: int, count: int):
        """Yield features [S, P, F] for each batch of an epoch of `count` IND images."""
        total, size = pseudo_sizes(self.config, count)
        codes = [self.pseudo.draw(total, generator(seed, "pseudo", epoch)) for seed in self.seeds]
        chunk = STEPS_PER_CHUNK * size
        for start in range(0, total, chunk):
            features = torch.stack([self.pseudo.encode(c.rows(start, start + chunk)) for c in codes])
            yield from features.split(size, dim=1)


class PooledFeatures:
    """Draws with replacement from a pool of pseudo-OOD images, made once for each seed."""

    def __init__(self, pseudo: PseudoOOD, config: FineTuneConfig, seeds: Sequence[int]):
        self.config, self.seeds = config, seeds
        self.pools = torch.stack(
            [pseudo.encode(pseudo.draw(config.pseudo_pool, generator(seed, "pool"))) for seed in seeds]
        )

    def for_margins(self, count: int) -> Tensor:
        """The pools themselves, whatever the count: [S, N, F]."""
        return self.pools

    def batches(self, epoch: int, count: int):
        """Yield features [S, P, F] for each batch of an epoch of `count` IND images."""
        total, size = pseudo_sizes(self.config, count)
        draws = [
            torch.randint(self.config.pseudo_pool, (total,), generator=generator(seed, "pseudo", epoch))
            for seed in self.seeds
        ]
        for rows in torch.stack(draws).to(self.pools.device).split(size, dim=1):
            yield torch.stack([pool[r] for pool, r in zip(self.pools, rows, strict=True)])


class Checker:
    """Scores the heads as they stand on test, OOD and validation images."""

    def __init__(
        self, head: nn.Module, bank: FeatureBank, pseudo: PseudoOOD, config: FineTuneConfig, seeds: Sequence[int]
    ):
        self.head, self.bank, self.config, self.seeds = head, bank, config, seeds
        count = len(bank.validation)
        self.fresh = (
            [pseudo.encode(pseudo.draw(count, generator(seed, "validation"))) for seed in seeds] if count else None
        )
        self.best: dict[tuple[str, int], float] = {}

    @torch.no_grad()
    def check(self, step: int, stacks: dict[str, HeadStack], runs: dict[tuple[str, int], Run]) -> None:
        """Append a `Check` to every run and keep the heads whose validation figure is the best so far."""
        for (mode, s), run in runs.items():
            parameters = stacks[mode].view(s)

            def score(features: Tensor, parameters=parameters, mode=mode) -> Tensor:
                return score_logits(head_logits(self.head, parameters, features), mode, self.config)

            logits = head_logits(self.head, parameters, self.bank.test)
            if not torch.isfinite(logits).all():
                remedy = (
                    "lower --lr, or use --precision fp32" if step else "train the classifier anew, with a lower --lr"
                )
                raise UserError(f"{mode}, seed {run.seed}: the logits are not finite after step {step}: {remedy}")
            ind_scores = score_logits(logits, mode, self.config)
            figures = {name: auroc(ind_scores, score(features)) for name, features in self.bank.ood.items()}
            validation = auroc(score(self.bank.validation), score(self.fresh[s])) if self.fresh else None
            run.curve.append(
                Check(step, accuracy(logits, self.bank.test_labels, self.config.num_ind), figures, validation)
            )
            if validation is not None and validation > self.best.get((mode, s), -1.0):
                self.best[mode, s] = validation
                run.validated, run.validated_step = stacks[mode].copy(s), step
