"""Stage 2 against a plain implementation of the public protocol: same networks, same draws, one run.

    python -m benchmarks.stage2 [--quick] [--device cuda]
    python -m benchmarks.stage2 --trained partition1 --data-dir DIR

plain: `cmg.reference`: every step encodes its IND and pseudo-OOD batch again, every evaluation the whole test set, and
every mode, seed and OOD set is a run of its own; of runs of the same size one is timed. Sizes are MNIST's (Setting 1)
and CIFAR-10's (Setting 2), divided by --scale; batches keep their 128 images and evaluations are as frequent, per image
trained on, as at full size where that is possible ("evaluations" and "evaluations_at_full_size" count them). The
networks are the tasks' own, untrained; the images are noise of different brightness. "arithmetic_share" is the share
of the engine's time, for 2 modes and 5 seeds in auto precision, that the networks alone would take for as many images.
"auroc_difference" is the largest, at any evaluation, between the curves of the plain side and of the engine in fp32;
scores of noise lie so close together that rounding exchanges a few.

--trained compares the curves where it matters, and nothing else: with MNIST, networks that `train` left in ckpt/, a
training set divided by --scale, and all test and OOD images. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.measure import in_turn, peak_mib, plainly, print_json, seconds
from cli.errors import run_command
from cli.options import positive_int
from cmg.config import config_for
from cmg.data import Stage2Data
from cmg.pseudo_ood import decode, draw_codes
from cmg.reference import reference
from cmg.stage2 import Split, Stage2, load_inputs
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import COMMANDS, TASKS, Experiment
from evaluation.report import markdown, spread
from models.inference import CHUNK, for_inference
from training.stages import STAGES
from utils import autocast, environment, pick_precision, start_computing

SEEDS = 5
MNIST = "same_dataset_mnist"
OOD_SIZES = {
    "SVHN": 26032,
    "LSUN": 10000,
    "LSUN-FIX": 10000,
    "tinyImageNet": 10000,
    "ImageNet-FIX": 10000,
    "CIFAR100": 10000,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.stage2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Small sizes: under a minute, rough numbers")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the first CUDA GPU, else the CPU)")
    parser.add_argument("--scale", type=positive_int, help="Divide the images by this (default: 20; 300 with --quick)")
    parser.add_argument(
        "--setting2-scale",
        type=positive_int,
        help="Divide the images of Setting 2 by this (default: 100; 3000 with --quick)",
    )
    parser.add_argument(
        "--trained",
        choices=list(TASKS[MNIST].partitions),
        metavar="PARTITION",
        help="Compare the AUROC curves with the networks of this partition that train left in ckpt/",
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("datasets"), help="Folder of MNIST, for --trained (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> None:

    device = start_computing(args.device)
    auto = pick_precision("auto", device)
    scale = args.scale or (300 if args.quick else 20)
    if args.trained:
        compare_curves(Work(MNIST, *trained(args.trained, args.data_dir, scale, device), 1, device), auto, seed=0)
        return
    repeats = (1, 1) if args.quick else (3, 8)  # rounds, and chunks in a row, of the networks alone
    setting2_scale = args.setting2_scale or (3000 if args.quick else 100)
    found = setting1(scale, auto, repeats, device) | setting2(setting2_scale, auto, repeats, device)
    print_json(found | {"peak_mib": peak_mib(device)} | environment(device))


SINGLE = ["CMG-energy"], [0]  # one mode, which needs margins too, and one seed
BOTH_MODES, SEED_LIST = ["CMG-energy", "CMG-softmax"], list(range(SEEDS))


def setting1(scale: int, auto: str, repeats: tuple[int, int], device: torch.device) -> dict:
    """MNIST's sizes: one mode and seed, and both modes with all seeds."""
    sizes = {"train": 36017, "test": 6031, "ood": {"held-out-classes": 3969}}
    work = Work(MNIST, *untrained(MNIST, sizes, scale, device), scale, device)
    plain, plain_curve, plain_images = work.plain(*SINGLE)
    engine, (engine_curve,), engine_images = work.engine(*SINGLE, "fp32")
    in_auto, (auto_curve,), _ = work.engine(*SINGLE, auto)
    batched, fp32_curves, batched_images = work.engine(BOTH_MODES, SEED_LIST, "fp32")
    batched_auto, auto_curves, _ = work.engine(BOTH_MODES, SEED_LIST, auto)
    arithmetic = work.arithmetic(SEEDS, auto, *repeats)
    runs = len(BOTH_MODES) * SEEDS  # independent, and of the same size
    print(f"one mode and seed: plain {plain:.1f} s, engine {engine:.1f} s, in auto precision {in_auto:.1f} s")
    print(
        f"2 modes, 5 seeds: plain {runs * plain:.1f} s (10 times the above), engine {batched:.1f} s, "
        f"in auto precision {batched_auto:.1f} s, of which the networks take {arithmetic:.1f} s"
    )
    last = {  # mode -> precision -> spread over seeds
        mode: {
            precision: spread([curve[-1] for curve in curves[m * SEEDS : (m + 1) * SEEDS]])
            for precision, curves in {"fp32": fp32_curves, auto: auto_curves}.items()
        }
        for m, mode in enumerate(BOTH_MODES)
    }
    return {
        "ratio_single": round(plain / engine, 2),
        "ratio_batched": round(runs * plain / batched, 2),
        "ratio_auto_precision": round(engine / in_auto, 2),
        "ratio_batched_auto_precision": round(batched / batched_auto, 2),
        "auroc_difference": largest_difference(plain_curve, engine_curve),
        "auroc_difference_first_check": abs(plain_curve[0] - engine_curve[0]),
        "auroc_of_one_pair": 1 / (len(work.data.test) * len(work.data.ood["held-out-classes"])),
        "auroc_difference_auto_precision": largest_difference(plain_curve, auto_curve),
        "auroc_last": last,
        "arithmetic_share": round(arithmetic / batched_auto, 3),
        "evaluations": len(plain_curve),
        "evaluations_at_full_size": 213,
        "images_plain": plain_images,
        "images_engine": engine_images,
        "images_ratio_batched": round(plain_images * runs / batched_images, 2),
    }


def setting2(scale: int, auto: str, repeats: tuple[int, int], device: torch.device) -> dict:
    """CIFAR-10's sizes: both modes and all seeds against six OOD sets."""
    sizes = {"train": 50000, "test": 10000, "ood": OOD_SIZES}
    work = Work("different_dataset", *untrained("different_dataset", sizes, scale, device), scale, device)
    plain, plain_images = 0.0, 0
    for name, count in (("SVHN", 1), ("LSUN", 5)):  # the others are of LSUN's size
        taken, curve, pushed = work.plain(*SINGLE, [name])
        plain += taken * count * len(BOTH_MODES) * SEEDS
        plain_images += pushed * count * len(BOTH_MODES) * SEEDS
    engine, _, images = work.engine(BOTH_MODES, SEED_LIST, "fp32")
    in_auto, _, _ = work.engine(BOTH_MODES, SEED_LIST, auto)
    arithmetic = work.arithmetic(SEEDS, "fp32", *repeats)
    print(
        f"Setting 2: plain {plain:.1f} s (10 times 6 runs), engine {engine:.1f} s, of which the "
        f"networks take {arithmetic:.1f} s, in auto precision {in_auto:.1f} s"
    )
    return {
        "ratio_setting2": round(plain / engine, 2),
        "ratio_setting2_auto_precision": round(engine / in_auto, 2),
        "setting2_arithmetic_share_fp32": round(arithmetic / engine, 3),
        "setting2_evaluations": len(curve),
        "setting2_evaluations_at_full_size": 60,
        "images_ratio_setting2": round(plain_images / images, 2),
    }


def compare_curves(work: Work, auto: str, seed: int) -> None:
    """Print how far the AUROC curves of the engine are from those of the plain side, mode by mode."""

    metrics = {}
    for mode in BOTH_MODES:
        _, plain, _ = work.plain([mode], [seed])
        metrics[mode] = {"auroc_first": plain[0], "auroc_last": plain[-1]}
        for precision in dict.fromkeys(("fp32", auto)):
            _, (curve,), _ = work.engine([mode], [seed], precision)
            metrics[mode][f"auroc_difference_{precision}"] = largest_difference(plain, curve)
    evaluations, columns = len(plain), list(metrics[mode])  # the same for every mode
    counts = [f"{count:,} {name}" for name, count in work.data.counts().items() if count]
    rows = [[mode, *(f"{value:.4g}" for value in row.values())] for mode, row in metrics.items()]
    print(f"{', '.join(counts)}, {evaluations} evaluations\n\n{markdown(['mode', *columns], rows)}")
    print_json({"curves": metrics, "evaluations": evaluations, "images": work.data.counts()} | environment(work.device))


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def untrained(task_name: str, sizes: dict, scale: int, device: torch.device) -> tuple[list[nn.Module], Stage2Data]:
    """Classifier and CVAE of a task, with random weights, and noise of the given sizes, as `Stage2Data`."""
    task = TASKS[task_name]
    num_ind = len(next(iter(task.partitions.values())))
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)

    def images(count: int) -> Images:
        shape = (max(1, count // scale), task.image_channels, task.image_size, task.image_size)
        brightness = torch.rand(shape[0], 1, 1, 1, generator=random)
        pixels = (torch.randint(256, shape, generator=random) * brightness).to(torch.uint8)
        return Images(pixels, torch.randint(num_ind, shape[:1], generator=random)).to(device)

    networks = [STAGES[command].build(task).to(device).eval().requires_grad_(False) for command in COMMANDS]
    ood = {name: images(count).images for name, count in sizes["ood"].items()}
    return networks, Stage2Data(images(sizes["train"]), images(0).at(torch.arange(0)), images(sizes["test"]), ood)


def trained(partition: str, data_dir: Path, scale: int, device: torch.device) -> tuple[list[nn.Module], Stage2Data]:
    """Classifier and CVAE that `train` made for MNIST, and its images as `Stage2Data`, one of `scale` to train on."""
    experiment = Experiment.of(MNIST, TASKS[MNIST], partition)
    paths = {command: experiment.checkpoint(command) for command in COMMANDS}
    inputs = load_inputs(experiment, paths, experiment.task.ood_datasets, data_dir, device)
    train, validation = inputs.data.train, inputs.data.validation
    fewer = {"train": train.at(torch.arange(0, len(train), scale)), "validation": validation.at(torch.arange(0))}
    return [inputs.classifier, inputs.cvae], replace(inputs.data, **fewer)


class Work:
    """One task's stage 2 at a scale: networks, images, and the two ways through them."""

    def __init__(
        self,
        task_name: str,
        networks: Sequence[nn.Module],
        data: Stage2Data,
        more_evaluations: int,
        device: torch.device,
    ):
        """Evaluations come `more_evaluations` times as often as the task's own, so as often per image trained on where
        its training set and test images are both divided by it."""
        self.plain_networks, self.networks = (
            [copy.deepcopy(network).to(memory_format=memory_format) for network in networks]
            for memory_format in (torch.contiguous_format, torch.channels_last)
        )
        self.data, self.device = data, device
        own = config_for(Experiment.of(task_name, TASKS[task_name]), "fp32")
        self.config = replace(own, eval_every=max(1, round(own.eval_every / more_evaluations)))

    @staticmethod
    def counted(classifier: nn.Module, extractor_images: list[int]) -> Callable[[Tensor], Tensor]:
        """The classifier's features, counting the images that go through."""

        def features(images):
            extractor_images[0] += len(images)
            return classifier.features(images)

        return features

    def engine(self, modes: list[str], seeds: list[int], precision: str) -> tuple[float, list[list[float]], int]:
        """Seconds, AUROC curve of every run, mode by mode, on the first OOD set, images through the extractor."""

        config, pushed, runs = replace(self.config, precision=precision), [0], []

        def work():
            classifier, cvae = for_inference(self.networks[0]), self.networks[1]
            stage2 = Stage2.of(Split(self.counted(classifier, pushed), classifier.classifier), cvae, config)
            runs.extend(stage2.fine_tune(stage2.encode(self.data), modes, seeds, show_progress=False))

        taken = seconds(work, self.device)
        first = next(iter(self.data.ood))
        return taken, [[check.auroc[first] for check in run.curve] for run in runs], pushed[0]

    def arithmetic(self, seeds: int, precision: str, rounds: int, chunks: int) -> float:
        """Seconds of the networks alone for as many images as `engine` makes and encodes, from those of
        some `chunks` in a row."""
        classifier, cvae = map(for_inference, self.networks)
        chunk, random = CHUNK[self.device.type], torch.Generator().manual_seed(0)
        codes = draw_codes(chunk, cvae.z_dim, self.config, random).to(self.device)
        images = to_float(self.data.train.images[torch.arange(chunk) % len(self.data.train)])

        def real():
            with torch.no_grad(), autocast(self.device, precision):
                for _ in range(chunks):
                    classifier.features(images)

        def pseudo():
            with torch.no_grad(), autocast(self.device, precision):
                for _ in range(chunks):
                    classifier.features(decode(cvae, codes, self.config.sigma).float())

        taken = in_turn({"real": real, "pseudo": pseudo}, rounds, self.device)
        made = seeds * (self.config.epochs + 1) * len(self.data.train)  # once more for the margins
        return (taken["real"] * sum(self.data.counts().values()) + taken["pseudo"] * made) / (chunk * chunks)

    def plain(self, modes: list[str], seeds: list[int], ood: list[str] | None = None) -> tuple[float, list[float], int]:
        """Likewise, one run for each mode, seed and OOD set (`ood`, or all) after the other; the curve of the first."""

        pushed, curves = [0], []
        features = self.counted(self.plain_networks[0], pushed)

        def work():
            for mode in modes:
                for seed in seeds:
                    for name in ood or self.data.ood:
                        curves.append(self.reference_curve(mode, seed, name, features))

        return seconds(plainly(work), self.device), curves[0], pushed[0]

    def reference_curve(self, mode: str, seed: int, ood_name: str, features: Callable[[Tensor], Tensor]) -> list[float]:
        """The public protocol for one mode, seed and OOD set as `cmg.reference` has it; its draws are the engine's."""
        classifier, cvae = self.plain_networks
        counting = SimpleNamespace(features=features, classifier=classifier.classifier)
        train, test, ood = self.data.train, self.data.test.images, self.data.ood[ood_name]
        result = reference(counting, cvae, train.images, train.labels, test, ood, self.config, mode, seed)
        return list(result.curve.values())


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
