"""Stage 2 as an engine: `cmg.reference` for every mode and seed in one pass.

The extractor is frozen, in eval mode and sees no augmentation, so the features of all real images are
constants: they come in here, encoded once. Only pseudo-OOD images, fresh in every step, still go through
the networks. They depend on the seed and not on the mode: all modes of a seed share them, as they share the
order of the IND images. Nothing here depends on the OOD sets, which are only scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cli.errors import UserError
from cli.progress import Progress
from cmg.config import FineTuneConfig
from cmg.data import FeatureBank
from cmg.graphed import Graphed
from cmg.losses import MODES, Margins, find_margins
from cmg.pseudo_ood import FreshFeatures, PooledFeatures, PseudoOOD
from cmg.scores import SCORES
from evaluation.metrics import accuracy, auroc
from utils import autocast, generator


class Evaluation(NamedTuple):
    """One evaluation: of the optimizer step it follows, on the test images and on the validation images."""

    step: int
    accuracy: float
    auroc: dict[str, float]
    validation_auroc: float | None


@dataclass
class Run:
    """The result of fine-tuning one head.

    Attributes:
        margins: m_in and m_out, where the mode uses them.
        curve: the evaluations, in the order of steps.
        last: the parameters, as they are scored, after the last step.
        validated: those at `validated_step`, the evaluation with the best AUROC of validation images against fresh
            pseudo-OOD images; None where no validation images were kept.
    """

    mode: str
    seed: int
    margins: tuple[float, float] | None
    curve: list[Evaluation] = field(default_factory=list)
    last: dict[str, Tensor] | None = None
    validated: dict[str, Tensor] | None = None
    validated_step: int | None = None


def fine_tune(
    head: nn.Module,
    bank: FeatureBank,
    pseudo: PseudoOOD,
    modes: Sequence[str],
    seeds: Sequence[int],
    show_progress: bool = True,
) -> list[Run]:
    """Fine-tune a copy of `head` for every mode and seed, as `pseudo.config` asks for it; `head` stays as it is.

    A run's draws follow from its seed alone, so its result does not depend on what else is tuned beside it, up
    to the rounding of batched products.
    """
    config, device, count = pseudo.config, bank.train.device, len(bank.train)
    heads = {mode: HeadStack(head, len(seeds), config.interpolation) for mode in modes}
    source = pseudo.batches(seeds)
    margins = margins_of(head, bank, source, config) if any(MODES[mode].uses_margins for mode in modes) else None
    runs = start_runs(modes, seeds, margins)
    evaluator = Evaluator(head, bank, pseudo, seeds)
    leaves = [leaf for stack in heads.values() for leaf in stack.leaves.values()]
    on_gpu = device.type == "cuda"
    in_graph = on_gpu and config.half_life  # which can change tensors only
    rate = torch.tensor(config.learning_rate, device=device) if in_graph else config.learning_rate
    optimizer = torch.optim.Adam(leaves, rate, fused=True, capturable=on_gpu)

    def step_as_it_is(rows: Tensor, pseudo_features: Tensor) -> Tensor:
        with autocast(device, config.precision):
            loss = total_loss(heads, bank.train[rows], bank.train_labels[rows], pseudo_features, margins, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for stack in heads.values() if config.anchor else ():
            stack.pull(config.anchor)
        optimizer.step()
        if config.half_life:
            optimizer.param_groups[0]["lr"] *= 0.5 ** (1 / config.half_life)
        return loss.detach()

    take_step = Graphed(step_as_it_is) if on_gpu else step_as_it_is
    progress = Progress(config.epochs * count, "stage 2", enabled=show_progress)
    step = 0
    for epoch in range(config.epochs):
        orders = [torch.randperm(count, generator=generator(seed, "order", epoch)) for seed in seeds]
        batches = torch.stack(orders).to(device).split(config.batch_size, dim=1)
        for rows, pseudo_features in zip(batches, source.of_epoch(epoch, count), strict=True):
            if step % config.eval_every == 0:
                evaluator.evaluate(step, heads, runs)
            loss = take_step(rows, pseudo_features)
            step += 1
            progress.advance(
                rows.shape[1], lambda: f"epoch {epoch + 1}/{config.epochs}  loss {loss.item() / len(runs):.4f}"
            )
    evaluator.evaluate(step, heads, runs)
    progress.close()
    for (mode, s), run in runs.items():
        run.last = heads[mode].copy(s)
    return list(runs.values())


def start_runs(modes: Sequence[str], seeds: Sequence[int], margins: Margins | None) -> dict[tuple[str, int], Run]:
    """A `Run` without a curve for every mode and the number of every seed."""

    def of(mode: str, s: int) -> tuple[float, float] | None:
        return (margins.m_in[s].item(), margins.m_out[s].item()) if MODES[mode].uses_margins else None

    return {(mode, s): Run(mode, seed, of(mode, s)) for mode in modes for s, seed in enumerate(seeds)}


def total_loss(
    heads: dict[str, HeadStack],
    ind_features: Tensor,
    labels: Tensor,
    pseudo_features: Tensor,
    margins: Margins | None,
    config: FineTuneConfig,
) -> Tensor:
    """Sum of the losses of all heads, whose gradients do not meet, without the anchor's part: features [S, B, F] and
    [S, P, F], labels [S, B]."""
    total = 0
    features, sizes = torch.cat([ind_features, pseudo_features], 1), [ind_features.shape[1], pseudo_features.shape[1]]
    for mode, stack in heads.items():
        ind_logits, pseudo_logits = stack(features).split(sizes, 1)
        losses = MODES[mode].loss(ind_logits, labels, pseudo_logits, margins, config)
        total = total + losses.sum()
    return total


def margins_of(
    head: nn.Module, bank: FeatureBank, source: FreshFeatures | PooledFeatures, config: FineTuneConfig
) -> Margins:
    """The margins of every seed, [S] each, from the IND training images and as many pseudo-OOD images (or the pool),
    under the head as it is before fine-tuning."""
    start = dict(head.named_parameters())
    ind_logits = head_logits(head, start, bank.train)
    of_seeds = [
        find_margins(ind_logits, head_logits(head, start, features), config)
        for features in source.for_margins(len(bank.train))
    ]
    return Margins(*map(torch.stack, zip(*of_seeds, strict=True)))


# --- heads --------------------------------------------------------------------------------------


class HeadStack:
    """Copies of a head, trained side by side as one batched computation.

    Args:
        interpolation: share of the tuned weights in those that `copy` gives, the rest is the start's (Wortsman et al.,
            CVPR 2022).

    Attributes:
        leaves: what is optimized, by name: [K, ...] for K copies. Weights are transposed there: the gradient of a
            batched product comes out that way, and to turn it round took longer than the product.
        start: what the copies began as, in the same layout: [1, ...].
    """

    def __init__(self, head: nn.Module, copies: int, interpolation: float = 1.0):
        self.head, self.interpolation = head, interpolation
        self.start = {name: turned(p.detach()[None]).contiguous() for name, p in head.named_parameters()}
        self.leaves = {name: torch.cat([p] * copies).requires_grad_() for name, p in self.start.items()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, as the head has them: [K, ...]."""
        return {name: turned(leaf) for name, leaf in self.leaves.items()}

    def __call__(self, features: Tensor) -> Tensor:
        """[K, B, F] -> [K, B, C], each copy on its own batch."""
        return vmap(partial(functional_call, self.head))(self.parameters, features).float()

    @torch.no_grad()
    def pull(self, strength: float) -> None:
        """Add to the gradients that of `strength` times each copy's squared distance from the start. To have it from
        `backward` took nearly as long as the rest of a step."""
        for name, leaf in self.leaves.items():
            leaf.grad += 2 * strength * (leaf - self.start[name])

    def copy(self, k: int) -> dict[str, Tensor]:
        """The parameters of copy k that are scored, in the layout of the head itself: scored here or from a file, they
        give the same bits."""
        tuned = {name: leaf.detach()[k : k + 1] for name, leaf in self.leaves.items()}
        if self.interpolation < 1:
            tuned = {name: torch.lerp(self.start[name], p, self.interpolation) for name, p in tuned.items()}
        return {name: turned(p)[0].clone(memory_format=torch.contiguous_format) for name, p in tuned.items()}


def turned(parameter: Tensor) -> Tensor:
    """Stacked weights [K, O, I] -> [K, I, O] and back; biases [K, O] as they are."""
    return parameter.mT if parameter.dim() == 3 else parameter


HEAD_CHUNK = 4096  # images at once through a head, whose features may be many


@torch.no_grad()
def head_logits(head: nn.Module, parameters: dict[str, Tensor], features: Tensor) -> Tensor:
    """Logits [N, C] of `head` with the given parameters, in fp32."""
    return torch.cat([functional_call(head, parameters, (part,)) for part in features.split(HEAD_CHUNK)])


# --- evaluations on the way ---------------------------------------------------------------------


class Evaluator:
    """Scores the heads as they stand on test, OOD and validation images."""

    def __init__(self, head: nn.Module, bank: FeatureBank, pseudo: PseudoOOD, seeds: Sequence[int]):
        self.head, self.bank, self.config = head, bank, pseudo.config
        count = len(bank.validation)
        self.fresh = (
            [pseudo.encode(pseudo.draw(count, generator(seed, "validation"))) for seed in seeds] if count else None
        )
        self.best: dict[tuple[str, int], float] = {}

    def raised(self) -> str:
        """Options that may have made the loss too large."""
        heavy = {"--mu": self.config.mu > FineTuneConfig.mu, "--anchor": self.config.anchor > 0}
        return " or ".join(["--lr", "--sigma", *(flag for flag, is_heavy in heavy.items() if is_heavy)])

    @torch.no_grad()
    def evaluate(self, step: int, heads: dict[str, HeadStack], runs: dict[tuple[str, int], Run]) -> None:
        """Append an `Evaluation` to every run and keep the heads whose validation AUROC is the best so far.

        Raises:
            UserError: the logits of a head are not finite.
        """
        for (mode, s), run in runs.items():
            parameters, score_name = heads[mode].copy(s), self.config.score_of(mode)

            def score(features: Tensor, parameters=parameters, score_name=score_name) -> Tensor:
                return SCORES[score_name](head_logits(self.head, parameters, features), self.config.num_ind)

            logits = head_logits(self.head, parameters, self.bank.test)
            if not torch.isfinite(logits).all():
                remedy = f"lower {self.raised()}" if step else "train the classifier anew, with a lower --lr"
                remedy += ", or use --precision fp32" if self.config.precision == "bf16" else ""
                raise UserError(f"{mode}, seed {run.seed}: the logits are not finite after step {step}: {remedy}")
            ind_scores = SCORES[score_name](logits, self.config.num_ind)
            aurocs = {name: auroc(ind_scores, score(features)) for name, features in self.bank.ood.items()}
            validation = auroc(score(self.bank.validation), score(self.fresh[s])) if self.fresh else None
            correct = accuracy(logits, self.bank.test_labels, self.config.num_ind)
            run.curve.append(Evaluation(step, correct, aurocs, validation))
            if validation is not None and validation > self.best.get((mode, s), -1.0):
                self.best[mode, s] = validation
                run.validated, run.validated_step = parameters, step
