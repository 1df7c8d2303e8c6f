"""CMG in pytorch-ood's own benchmarks for CIFAR-10, beside that library's MSP, energy and KNN on the same classifier.

    python -m train --task different_dataset --command train_classifier
    python -m train --task different_dataset --command train_cvae
    python -m examples.pytorch_ood_benchmark --benchmark odin

The library downloads its data sets to --data-dir, those of `openood` with the help of the package gdown. One row for
each OOD set and detector, in per cent; CMG is the head after the last step, nothing selected.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytorch_ood.benchmark
from pytorch_ood.detector import KNN, EnergyBased, MaxSoftmax
from pytorch_ood.utils import ToRGB, extract_features
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from cli.errors import UserError, run_command
from cli.options import add_machine_arguments, add_seed_argument, positive_int
from cmg.config import FineTuneConfig, config_for
from cmg.detector import CMGDetector
from cmg.losses import MODES
from datasets.tasks import COMMANDS, TASKS, Experiment
from evaluation.report import METRICS, POSITIVE_CLASS, aggregate, align, cells
from models.inference import CHUNK
from models.main_model import MainModel
from models.vae import ConditionalVAE
from training.networks import load_networks
from utils import pick_precision, start_computing

TASK, PARTITION = "different_dataset", "all"
BENCHMARKS = {"odin": "CIFAR10_ODIN", "openood": "CIFAR10_OpenOOD"}  # classes of pytorch_ood.benchmark
THEIR_METRICS = {"AUROC": "auroc", "FPR95TPR": "fpr95", "AUPR-OUT": "aupr_out", "AUPR-IN": "aupr_in"}  # theirs -> ours


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.pytorch_ood_benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--benchmark", choices=list(BENCHMARKS), default="odin", help="Benchmark of pytorch-ood (default: %(default)s)"
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="The classifier's checkpoint (default: where train writes it)"
    )
    parser.add_argument("--params-dict-name2", type=Path, help="The CVAE's checkpoint (default: where train writes it)")
    parser.add_argument("--epochs", type=positive_int, help="Epochs of fine-tuning (default: the task's)")
    add_seed_argument(parser, " of fine-tuning")
    add_machine_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    device, experiment = start_computing(args.device), Experiment.of(TASK, TASKS[TASK], PARTITION)
    given = {"train_classifier": args.params_dict_name, "train_cvae": args.params_dict_name2}
    paths = {command: given[command] or experiment.checkpoint(command) for command in COMMANDS}
    classifier, cvae, _ = load_networks(experiment, paths, device)
    options = {"epochs": args.epochs} if args.epochs else {}
    config = config_for(experiment, pick_precision(args.precision, device, experiment.task.precision), **options)
    benchmark = make_benchmark(args.benchmark, args.data_dir, experiment.task.image_size)
    rows = compare(benchmark, classifier, cvae, config, args.seed, CHUNK[device.type])
    print(f"\n{format_rows(rows)}")


def make_benchmark(name: str, root: Path, size: int):
    """A benchmark of the library, its images brought to `size` in colour.

    Raises:
        UserError: its data sets are not there and cannot be downloaded.
    """
    transform = Compose([ToRGB(), Resize(size), CenterCrop(size), ToTensor()])
    try:
        root.mkdir(parents=True, exist_ok=True)
        return getattr(pytorch_ood.benchmark, BENCHMARKS[name])(str(root), transform)
    except (OSError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--benchmark {name}: its data sets are not all in {root} and pytorch-ood cannot download them ({reason}). "
            "Fix that, or name another --data-dir"
        ) from None


def compare(
    benchmark,
    classifier: MainModel,
    cvae: ConditionalVAE,
    config: FineTuneConfig,
    seed: int,
    batch_size: int,
) -> list[dict]:
    """Fit CMG in both modes and the library's detectors on the benchmark's training set; evaluate all of them.

    Returns:
        For each OOD set and detector a row of "ood_dataset", "method" and the metrics of `THEIR_METRICS`.
    """
    cmg = {mode: CMGDetector(classifier, cvae, config, mode, seed=seed) for mode in MODES}
    encoder = next(iter(cmg.values())).encoder
    for detector in cmg.values():
        detector.encoder = encoder  # the very same, so that the benchmark encodes each image once for all
    knn, device = KNN(encoder), next(classifier.parameters()).device
    features = extract_features(DataLoader(benchmark.train_set(), batch_size), encoder, device)
    for detector in (*cmg.values(), knn):
        detector.fit_features(*features)
    methods = {"MSP": MaxSoftmax(classifier), "energy": EnergyBased(classifier), "KNN": knn} | cmg
    results = benchmark.evaluate(list(methods.values()), {"batch_size": batch_size}, device=str(device))
    names = list(methods) * len(benchmark.ood_names)  # the results come one OOD set after the other
    return [
        {"ood_dataset": result["Dataset"], "method": name} | {ours: result[key] for key, ours in THEIR_METRICS.items()}
        for name, result in zip(names, results, strict=True)
    ]


def format_rows(rows: list[dict]) -> str:
    """The rows as a table in per cent."""
    keys = ("ood_dataset", "method")
    table = cells(aggregate(rows, keys, METRICS), keys, METRICS)
    return f"{align([['OOD set', 'method', *METRICS.values()], *table])}\n\n{POSITIVE_CLASS}."


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
