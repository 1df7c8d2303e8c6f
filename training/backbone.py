"""Backbones by name, their weights, and the features of images, which are computed once."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from cli.errors import UserError, memory_shortage
from cli.progress import Progress
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import BackboneChoice, Experiment
from models.backbone import Backbone, without_classifier
from models.inference import in_chunks
from training.checkpoints import fill_network, read_state, weights_checksum
from utils import load_checkpoint, save_checkpoint

DEFAULT_SIZE = 224  # pixels, where a backbone does not tell


def load_backbone(choice: BackboneChoice, pretrained: bool = True) -> Backbone:
    """The backbone that a task names, frozen and in eval mode.

    Args:
        pretrained: with its own weights, or those of `choice.weights`; otherwise with random ones, to be filled.

    Raises:
        UserError: there is none of that name, its package is missing, or its weights cannot be had or do not fit.
    """
    make = from_function if ":" in choice.name else from_torchvision if is_torchvision(choice.name) else from_timm
    backbone = make(choice, pretrained)
    backbone.name, backbone.size = choice.name, choice.size or backbone.size
    return backbone.eval().requires_grad_(False)


def is_torchvision(name: str) -> bool:
    return name in torchvision.models.list_models(module=torchvision.models)


def from_torchvision(choice: BackboneChoice, pretrained: bool) -> Backbone:
    """A classifier of `torchvision.models`, with the preprocessing of its default weights."""
    weights = torchvision.models.get_model_weights(choice.name).DEFAULT
    own = pretrained and choice.weights is None
    try:
        network = torchvision.models.get_model(choice.name, weights=weights if own else None)
    except OSError as error:
        raise UserError(
            f"--backbone {choice.name}: its weights cannot be fetched ({getattr(error, 'reason', error)}). Fetch "
            f"{weights.url} elsewhere and name the file with --backbone-weights FILE"
        ) from None
    except Exception as error:  # whatever a damaged file makes torch stumble over
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(
            f"--backbone {choice.name}: {file} is damaged ({first_line(error)}). Remove it, and it is fetched again"
        ) from None
    if pretrained and choice.weights:
        fill(network, choice)
    prepare = weights.transforms()
    mode = "bicubic" if prepare.interpolation == InterpolationMode.BICUBIC else "bilinear"
    return Backbone(without_classifier(network), prepare.crop_size[0], tuple(prepare.mean), tuple(prepare.std), mode)


def from_timm(choice: BackboneChoice, pretrained: bool) -> Backbone:
    """A model of timm, with its own preprocessing."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        timm = None
    known = torchvision.models.list_models(module=torchvision.models) + (timm.list_models() if timm else [])
    if not timm or choice.name.partition(".")[0] not in known:
        near = difflib.get_close_matches(choice.name, known, 3)
        where = "torchvision and timm" if timm else "torchvision (timm is not installed)"
        raise UserError(
            f"--backbone {choice.name}: no such model of {where}"
            + (f"; the nearest are {', '.join(near)}" if near else "; expected a name, or MODULE:FUNCTION")
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every further attempt
    try:
        network = timm.create_model(choice.name, pretrained=pretrained and choice.weights is None)
    except (OSError, RuntimeError) as error:
        where = getattr(timm.get_pretrained_cfg(choice.name, allow_unregistered=True), "hf_hub_id", None)
        file = f"pytorch_model.bin of {where} on the Hugging Face Hub" if where else "them"
        raise UserError(
            f"--backbone {choice.name}: its weights cannot be fetched ({str(error).splitlines()[0].rstrip('.')}). "
            f"Fetch {file} elsewhere and name the file with --backbone-weights FILE"
        ) from None
    if pretrained and choice.weights:
        fill(network, choice)
    network.reset_classifier(0)
    data = network.pretrained_cfg
    mode = "bicubic" if data.get("interpolation") == "bicubic" else "bilinear"
    return Backbone(network, data["input_size"][1], tuple(data["mean"]), tuple(data["std"]), mode)


def from_function(choice: BackboneChoice, pretrained: bool) -> Backbone:
    """What a function of the user's gives: a `Backbone`, or any module from images in [0, 1] to features."""
    module, _, function = choice.name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"--backbone {choice.name}: expected MODULE:FUNCTION, or the name of a model")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append("")  # the current folder, after all else: nothing in it takes another module's place
    try:
        network = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise UserError(f"--backbone {choice.name}: {missing} is not installed or not found; install it") from None
    except AttributeError:
        raise UserError(f"--backbone {choice.name}: {module} has no {function}; expected MODULE:FUNCTION") from None
    except (Exception, SystemExit) as error:  # the user's own code may do whatever it likes
        raise UserError(
            f"--backbone {choice.name}: cannot be made ({type(error).__name__}: {first_line(error)})"
        ) from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--backbone {choice.name}: gives a {type(network).__name__}, expected a torch.nn.Module")
    backbone = network if isinstance(network, Backbone) else Backbone(network, DEFAULT_SIZE)
    if pretrained and choice.weights:
        fill(backbone.network, choice)
    return backbone


def first_line(error: BaseException) -> str:
    """What an error says, or else is called."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fill(network: nn.Module, choice: BackboneChoice) -> None:
    """Load the user's file of weights. Raises `UserError`, which names the keys that do not fit."""
    remedy = f"Name the state dict of {choice.name} with --backbone-weights FILE"
    fill_network(
        choice.weights, read_state(choice.weights, choice.name, remedy), network, f"a {choice.name}", {}, remedy
    )


# --- features -----------------------------------------------------------------------------------


Encode = Callable[[Tensor, str, torch.device], Tensor]


def prepare(experiment: Experiment, data_dir: Path) -> tuple[Experiment, Encode, Backbone | None]:
    """An experiment as its networks see it, and what turns the images that are read, uint8 and on the CPU, into what
    they see: (images, precision, device) -> the same on the CPU.

    Without a backbone both are as they were. With one, images become its features, float32 [N, F, 1, 1]: images of F
    channels and one pixel. They are kept in `data_dir`/features, in files named after everything that they follow from.

    Raises:
        UserError: as `load_backbone`; or the images do not go through it.
    """
    choice = experiment.task.backbone
    if choice is None:
        return experiment, lambda images, precision, device: images, None
    backbone = load_backbone(choice)
    count, encode = encoder(backbone, Path(data_dir) / "features")
    resolved = replace(choice, size=backbone.size)
    task = replace(experiment.task, image_channels=count, image_size=1, backbone=resolved)
    return replace(experiment, task=task), encode, backbone


def encoder(backbone: Backbone, folder: Path) -> tuple[int, Encode]:
    """How many features a backbone gives, and what computes them, or finds them in `folder`. Raises `UserError`."""
    backbone.to(memory_format=torch.channels_last)
    probed = probe(backbone)
    count = probed.shape[1]
    weights = hashlib.sha256(f"{backbone.name} {backbone.size} {backbone.interpolation} {seen_from(probed)}".encode())
    for tensor in backbone.state_dict().values():
        weights.update(tensor.cpu().contiguous().numpy().tobytes())

    def encode(images: Tensor, precision: str, device: torch.device) -> Tensor:
        key = weights.copy()
        key.update(f"{precision} {list(images.shape)}".encode())
        key.update(images.numpy().tobytes())
        path = folder / f"{key.hexdigest()[:32]}.pt"
        if (kept := read_features(path, len(images), count)) is not None:
            return kept
        backbone.to(device)
        progress = Progress(len(images), backbone.name)

        def of_part(part: Tensor) -> Tensor:
            features = features_of(backbone, to_float(part))
            if features.shape != (len(part), count, 1, 1):
                shape = list(features.shape[:2])
                raise UserError(
                    f"--backbone {backbone.name}: gives {shape} features for {len(part)} images, not {count} each"
                )
            return features

        features = in_chunks(of_part, images, precision, progress, device).cpu()
        progress.close()
        if bad := int((~features.flatten(1).isfinite().all(1)).sum()):
            raise UserError(
                f"--backbone {backbone.name}: the features of {bad} images are not finite; try --precision fp32"
            )
        save_checkpoint(path, {"features": features})
        return features

    return count, encode


def features_of(backbone: Backbone, images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, F, 1, 1]. Raises `UserError` where the network does not take them."""
    try:
        return backbone(images)
    except TypeError as error:
        raise UserError(f"--backbone {backbone.name}: {first_line(error)}") from None
    except Exception as error:  # of the user's own network
        if memory_shortage(error):
            raise
        raise UserError(
            f"--backbone {backbone.name}: does not take images of {backbone.size}x{backbone.size} pixels "
            f"({first_line(error)}); name another --image-size"
        ) from None


PROBES = 2  # images


@torch.no_grad()
def probe(backbone: Backbone) -> Tensor:
    """The features of images of noise, always the same, [PROBES, F], on the CPU. Raises `UserError`."""
    noise = torch.rand(PROBES, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(0))
    features = features_of(backbone, noise.to(backbone.mean.device)).flatten(1).float().cpu()
    if features.shape[0] != PROBES or not features.shape[1]:
        raise UserError(f"--backbone {backbone.name}: gives {list(features.shape)} features for {PROBES} images")
    return features


def answers(backbone: Backbone) -> list[float]:
    """What tells two functions with the same weights apart. Raises `UserError`."""
    return seen_from(probe(backbone))


def seen_from(features: Tensor) -> list[float]:
    """Features from a few directions, and the logarithm of their length, in so few digits that another processor finds
    the same."""
    features = features.double().flatten()
    length = features.norm().clamp_min(1e-30)
    directions = torch.randn(6, len(features), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [round(float(value), 2) for value in (*(directions @ features / length), length.log())]


def identity(backbone: Backbone) -> dict[str, object]:
    """What checkpoints say of the backbone on whose features a network was trained."""
    return {"backbone": weights_checksum(backbone), "backbone_answers": answers(backbone)}


def read_features(path: Path, rows: int, count: int) -> Tensor | None:
    """What an earlier command left, [rows, count, 1, 1], or None where there is nothing whole."""
    try:
        features = load_checkpoint(path).get("features") if path.is_file() else None
    except UserError:
        return None
    return features if isinstance(features, Tensor) and features.shape == (rows, count, 1, 1) else None


def encoded(encode: Encode, images: Images, precision: str, device: torch.device) -> Images:
    """Images and labels with the images encoded."""
    return Images(encode(images.images, precision, device), images.labels)
