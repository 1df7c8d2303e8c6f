"""Stage 1 against a plain loop and against the floor, in one run and on the same images.

    python -m benchmarks.stage1 [--quick] [--device cuda]

plain: a torchvision-style data set of PIL images, ToTensor, DataLoader, fp32 whatever --precision, ordinary Adam, and
the layers of the networks one after the other.
floor: forward, backward and optimizer step on one batch that is already there, in our precision.
matmul_share: how fast our loop computes, of the rate of one large matrix product in the same precision.
--compile adds our loop with the network compiled, --profile the shares of our loop's time that its parts take.
The last line is a JSON object, one entry per network.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import torch
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import VisionDataset
from torchvision.transforms.functional import to_pil_image

from benchmarks.measure import in_turn, matmul_tflops, peak_mib, plainly, print_json
from cli.errors import UserError, run_command
from cli.options import add_device_arguments, positive_int
from datasets.datasetsHelper import Images
from datasets.tasks import TASKS
from training.config import LoopConfig
from training.loop import fit
from training.processes import Processes
from training.run_state import Recorder
from training.stages import STAGES
from utils import autocast, environment, pick_device, pick_precision, tune_processor

NETWORKS = {
    "mnist_classifier": ("same_dataset_mnist", "train_classifier"),
    "mnist_cvae": ("same_dataset_mnist", "train_cvae"),
    "cifar10_classifier": ("same_dataset_cifar10", "train_classifier"),
    "cifar10_cvae": ("same_dataset_cifar10", "train_cvae"),
}

# Where the time goes: the first whose word is in the name of an operation, or else of one that calls it.
PROFILE = {
    "products": ("conv", "mm", "linear", "mv"),
    "batch_norm": ("batch_norm",),
    "activations": ("relu", "clamp", "threshold", "sigmoid"),
    "dropout": ("dropout",),
    "optimizer": ("adam",),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.stage1", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Small batches: under a minute, rough numbers")
    add_device_arguments(parser)
    parser.add_argument(
        "--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="Networks (default: all)"
    )
    parser.add_argument("--batch-size", type=positive_int, help="Images per step (default: 512; 64 with --quick)")
    parser.add_argument("--steps", type=positive_int, help="Steps per round (default: 4, on a GPU 40; 2 with --quick)")
    parser.add_argument("--rounds", type=positive_int, help="Rounds, of which the median counts (default: 3; 1)")
    parser.add_argument("--compile", action="store_true", help="Run our loop with torch.compile, too")
    parser.add_argument("--profile", action="store_true", help="Print what the time of our loop goes into")
    return parser


def main(args: argparse.Namespace) -> None:
    pick_device(args.device)  # what is no device is better found here than in another process
    entries = {}
    for name in args.network:
        entries[name] = entry = in_own_process(measure, name, args)
        print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in entry.items()), flush=True)
    print_json(entries)


def in_own_process(work: Callable, *args: object):
    """What `work` returns, in a process that has a peak of memory of its own and ends when this one is stopped."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(theirs, work, *args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()  # for its status
        raise UserError(
            f"the process of {args[0]} ended with status {process.exitcode}; see its message above"
        ) from None
    finally:
        process.kill()
        process.join()


def send_result(connection, work: Callable, *args: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process, which ends this one
    connection.send(work(*args))


def measure(name: str, args: argparse.Namespace) -> dict:
    """Time our loop, the plain one and the floor in turn; the median of the rounds counts."""
    tune_processor()
    task_name, command = NETWORKS[name]
    task, stage, device = TASKS[task_name], STAGES[command], pick_device(args.device)
    precision = pick_precision(args.precision, device)
    batch_size = args.batch_size or (64 if args.quick else 512)
    steps = args.steps or (2 if args.quick else 40 if device.type == "cuda" else 4)
    rounds = args.rounds or (1 if args.quick else 3)
    count = steps * batch_size
    random = torch.Generator().manual_seed(0)
    shape = (count, task.image_channels, task.image_size, task.image_size)
    images = torch.randint(256, shape, generator=random).to(torch.uint8)
    data = Images(images, torch.randint(6, (count,), generator=random))
    objective = stage.objective(task)

    def network():
        torch.manual_seed(0)
        return stage.build(task).to(device)

    ours = network().to(memory_format=torch.channels_last)
    stage.compact(ours)
    ours_optimizer = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
    config = LoopConfig(epochs=1, batch_size=batch_size, learning_rate=1e-3, seed=0, precision=precision)
    resident = data.to(device)

    def run_ours(compiled: bool = False):
        fit(ours, ours_optimizer, resident, objective, config, Processes(device), Recorder(name=name), compiled)

    run_ours()
    peak = peak_mib(device)  # before the others come
    run_plain = plain_loop(network(), data, command, task, batch_size, device)
    run_floor = floor_loop(ours, ours_optimizer, data, objective, batch_size, steps, device, precision)
    works = {"ours": run_ours, "floor": run_floor, "plain": plainly(run_plain)}
    if args.compile:
        works["compiled"] = partial(run_ours, compiled=True)
    times = in_turn(works, rounds, device)
    rate = {who: count / taken for who, taken in times.items()}
    tflops = rate["ours"] * operations_per_image(ours, data, objective, device) / 1e12
    at_best = matmul_tflops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return {
        "images_per_second": round(rate["ours"], 1),
        "plain_images_per_second": round(rate["plain"], 1),
        "floor_images_per_second": round(rate["floor"], 1),
        **({"compiled_images_per_second": round(rate["compiled"], 1)} if args.compile else {}),
        "ratio": round(rate["ours"] / rate["plain"], 2),
        "floor_share": round(rate["ours"] / rate["floor"], 3),
        "peak_mib": peak,
        "tflops": round(tflops, 3),
        "matmul_tflops": round(at_best, 3),
        "matmul_share": round(tflops / at_best, 3),
        "precision": precision,
        **(shares_of_time(run_ours, device) if args.profile else {}),
        **environment(device),
    }


def plain_loop(model, data, command: str, task, batch_size: int, device):
    """The loop as a tutorial writes it."""

    class PlainImages(VisionDataset):
        def __getitem__(self, index):
            return self.transform(to_pil_image(data.images[index])), int(data.labels[index])

        def __len__(self):
            return len(data)

    def classifier_loss(images, labels):
        return F.cross_entropy(model(images), labels)

    def cvae_loss(images, labels):
        noise = torch.randn(len(images), model.z_dim, device=device)
        reconstruction, mean, logvar = model(images, labels, noise)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        return F.mse_loss(reconstruction, images) + task.kl_weight * kl / images[0].numel()

    loss_of = {"train_classifier": classifier_loss, "train_cvae": cvae_loss}[command]
    augment = command == "train_classifier" and task.augment
    crop_and_flip = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*(crop_and_flip if augment else []), transforms.ToTensor()])
    loader = torch.utils.data.DataLoader(PlainImages("", transform=transform), batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run():
        model.train()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # as torch has it
            for images, labels in loader:
                loss = loss_of(images.to(device), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()

    return run


def floor_loop(model, optimizer, data, objective, batch_size: int, steps: int, device, precision: str):
    """Only the arithmetic: `steps` optimizer steps on one batch that is already on the device."""
    images, labels = data.images[:batch_size].to(device), data.labels[:batch_size].to(device)
    draws = [d.to(device) for d in objective.draw(batch_size, torch.default_generator)]

    def run():
        model.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                loss = objective(model, images, labels, *draws)["loss"]
            loss.backward()
            optimizer.step()

    return run


def shares_of_time(work: Callable[[], object], device) -> dict[str, float]:
    """The share of each part in `PROFILE`, and of the rest, in the time of all operations of `work`."""
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = dict.fromkeys((*PROFILE, "rest"), 0.0)
    with profile(acc_events=True) as profiler:  # or torch warns
        work()
    for event in profiler.events():
        part, caller = None, event
        while caller and not part:
            part = next((part for part, words in PROFILE.items() if any(w in caller.name.lower() for w in words)), None)
            caller = caller.cpu_parent
        times[part or "rest"] += getattr(event, time_of)
    return {part: round(taken / sum(times.values()), 3) for part, taken in times.items()}


def operations_per_image(model, data, objective, device) -> float:
    """Floating-point operations of one forward and backward pass, counted by torch."""
    images, labels = data.images[:8].to(device), data.labels[:8].to(device)
    draws = [d.to(device) for d in objective.draw(8, torch.default_generator)]
    with FlopCounterMode(display=False) as counter:
        objective(model, images, labels, *draws)["loss"].backward()
    return counter.get_total_flops() / 8


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
