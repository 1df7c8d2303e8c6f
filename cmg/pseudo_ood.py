"""Pseudo-OOD images: random codes, decoded under class-mixed embeddings, and their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cli.progress import Progress
from cmg.config import FineTuneConfig
from cmg.mixing import MIXINGS, mix_embeddings
from models.inference import CHUNK, in_chunks
from models.vae import ClassConditionalVAE
from utils import autocast, check_memory, generator


class Codes(NamedTuple):
    """The random numbers behind N pseudo-OOD images; row n makes image n, whatever the batching.

    Attributes:
        noise: [N, z_dim], standard normal.
        first, second: [N], the two classes.
        weight: [N, z_dim], of the first class in each dimension of the embedding: 0 or 1 in the method.
        image: [N], uniform in [0, 1): how far on among the IND training images is the one whose residual is added.
    """

    noise: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor
    image: Tensor

    def to(self, device: torch.device) -> Codes:
        return Codes(*(field.to(device, non_blocking=True) for field in self))

    def rows(self, start: int, stop: int) -> Codes:
        return Codes(*(field[start:stop] for field in self))


def draw_codes(count: int, z_dim: int, config: FineTuneConfig, generator: torch.Generator) -> Codes:
    """Draw two IND classes per image uniformly, independently or, with `config.pairs`, two that differ; the latent
    noise, and the weights with which their embeddings are mixed. Every mixing sees the same numbers."""
    first, second = torch.randint(config.num_ind, (2, count), generator=generator)
    if config.pairs == "distinct":
        second = (first + torch.randint(1, config.num_ind, (count,), generator=generator)) % config.num_ind
    noise = torch.randn(count, z_dim, generator=generator)
    uniform = torch.rand(count, z_dim, generator=generator)
    weight = MIXINGS[config.mixing].weights(uniform, config.mixing_probability)
    image = torch.rand(count, generator=generator) if config.residuals else torch.zeros(count)
    return Codes(noise, first, second, weight, image)


def decode(vae: ClassConditionalVAE, codes: Codes, sigma: float) -> Tensor:
    """Decode z = sigma * noise under the class-mixed embeddings: pseudo-OOD images [N, C, S, S] in [0, 1], or, by a
    CVAE of features, features [N, F] of such images."""
    mixed = mix_embeddings(vae.embed(codes.first), vae.embed(codes.second), codes.weight)
    return vae.decode(sigma * codes.noise, mixed)


@dataclass(frozen=True)
class PseudoOOD:
    """Makes the features of pseudo-OOD images, as `config` asks for them.

    Attributes:
        vae: in eval mode.
        features: images [B, C, S, S] in [0, 1] -> features [B, F], of the frozen extractor in eval mode.
        of_extracted: the same from what the extractor gives on, for a CVAE of features.
        head: features [B, F] -> logits [B, classes] before fine-tuning, by which some are left out.
        residuals: [N, F], what the CVAE of features leaves unexplained of the IND training images, which
            `config.residuals` needs.
    """

    vae: ClassConditionalVAE
    features: Callable[[Tensor], Tensor]
    config: FineTuneConfig
    of_extracted: Callable[[Tensor], Tensor] = lambda extracted: extracted
    head: Callable[[Tensor], Tensor] | None = None
    residuals: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def draw(self, count: int, generator: torch.Generator) -> Codes:
        """The random numbers of `count` images. Raises `MemoryShortage` where there is no room for so many."""
        needed = count * 4 * (5 + 3 * self.vae.z_dim)
        check_memory(needed, torch.device("cpu"), f"noise for {count:,} pseudo-OOD images")
        return draw_codes(count, self.vae.z_dim, self.config, generator)

    @torch.no_grad()
    def encode(self, codes: Codes, progress: Progress | None = None) -> Tensor:
        """Features [N, F] of the images of N codes, some more than once where others are left out. Raises
        `MemoryShortage` where there is no room for them."""
        parts, chunk, count = [], CHUNK[self.device.type], len(codes.first)
        to_features = self.features if self.vae.makes == "images" else self.of_extracted
        with autocast(self.device, self.config.precision):
            for start in range(0, count, chunk):
                part = codes.rows(start, start + chunk).to(self.device)
                made = self.with_residuals(decode(self.vae, part, self.config.sigma).float(), part)
                parts.append(to_features(made).float())
                if start == 0:  # they will be there in parts, as one and among those of all seeds
                    needed = 3 * count * parts[0][0].nbytes
                    check_memory(needed, self.device, f"the features of {count:,} pseudo-OOD images")
                if progress:
                    progress.advance(len(made))
        return self.without_confident(torch.cat(parts))

    def with_residuals(self, made: Tensor, codes: Codes) -> Tensor:
        """What was decoded, off the manifold of what the CVAE can make, as real images are: with `config.residuals`
        times what it leaves unexplained of an IND training image each."""
        if not self.config.residuals:
            return made
        rows = (codes.image * len(self.residuals)).long()
        return made + self.config.residuals * self.residuals[rows]

    def without_confident(self, features: Tensor) -> Tensor:
        """[N, F] with the others in turn in the place of those that the head before fine-tuning gives one IND class
        with more than `config.max_confidence`; where it does so with all, the least confident alone is kept."""
        if self.config.max_confidence == 1:
            return features
        confidence = in_chunks(self.head, features, "fp32")[:, : self.config.num_ind].softmax(1).amax(1)
        kept = (confidence <= max(self.config.max_confidence, confidence.min())).nonzero().flatten()
        return features[kept[torch.arange(len(features), device=kept.device) % len(kept)]]

    def batches(self, seeds: Sequence[int]) -> FreshFeatures | PooledFeatures:
        """Where the batches of fine-tuning come from: made in every step, or drawn from a pool."""
        return (PooledFeatures if self.config.pseudo_pool else FreshFeatures)(self, seeds)

    def in_an_epoch(self, count: int) -> tuple[int, int]:
        """Pseudo-OOD images for an epoch of `count` IND images, and for each of its batches but the last."""
        size = self.config.pseudo_batch_size or self.config.batch_size
        return -(-count * size // self.config.batch_size), size


STEPS_PER_CHUNK = 16  # whose pseudo-OOD images are made at once


class FreshFeatures:
    """New pseudo-OOD images for every step, as the method has it."""

    def __init__(self, pseudo: PseudoOOD, seeds: Sequence[int]):
        self.pseudo, self.seeds = pseudo, seeds

    def for_margins(self, count: int) -> Iterator[Tensor]:
        """Yield features [count, F] for each seed."""
        progress = Progress(len(self.seeds) * count, "margins")
        for seed in self.seeds:
            yield self.pseudo.encode(self.pseudo.draw(count, generator(seed, "margins")), progress)
        progress.close()

    def of_epoch(self, epoch: int, count: int) -> Iterator[Tensor]:
        """Yield features [S, P, F] for each batch of an epoch of `count` IND images."""
        total, size = self.pseudo.in_an_epoch(count)
        codes = [self.pseudo.draw(total, generator(seed, "pseudo", epoch)) for seed in self.seeds]
        chunk = STEPS_PER_CHUNK * size
        for start in range(0, total, chunk):
            features = torch.stack([self.pseudo.encode(c.rows(start, start + chunk)) for c in codes])
            yield from features.split(size, dim=1)


class PooledFeatures:
    """Draws with replacement from a pool of pseudo-OOD images, made once for each seed."""

    def __init__(self, pseudo: PseudoOOD, seeds: Sequence[int]):
        self.pseudo, self.seeds, self.size = pseudo, seeds, pseudo.config.pseudo_pool
        codes = [pseudo.draw(self.size, generator(seed, "pool")) for seed in seeds]
        progress = Progress(len(seeds) * self.size, "pool")
        self.pools = torch.stack([pseudo.encode(one, progress) for one in codes])
        progress.close()

    def for_margins(self, count: int) -> Tensor:
        """The pools themselves, whatever the count: [S, N, F]."""
        return self.pools

    def of_epoch(self, epoch: int, count: int) -> Iterator[Tensor]:
        """Yield features [S, P, F] for each batch of an epoch of `count` IND images."""
        total, size = self.pseudo.in_an_epoch(count)
        batch = 3 * min(size, total) * self.pools[0, 0].nbytes  # the features, beside the IND images' and as drawn
        needed = len(self.seeds) * (2 * 8 * total + batch)
        check_memory(needed, self.pools.device, f"{total:,} numbers of pseudo-OOD images and a batch of {size:,}")
        draws = [torch.randint(self.size, (total,), generator=generator(seed, "pseudo", epoch)) for seed in self.seeds]
        for rows in torch.stack(draws).to(self.pools.device).split(size, dim=1):
            yield torch.stack([pool[r] for pool, r in zip(self.pools, rows, strict=True)])
