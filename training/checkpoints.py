"""Checkpoints of networks: plain state dicts, as the first public code reads and writes them.

How a checkpoint was made rides along as an attribute of the state dict, which `load_state_dict` does not see.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from torch import Tensor, nn

from cli.errors import UserError
from cli.files import fits
from utils import check_values, load_checkpoint, save_checkpoint

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where others put a state dict beside what else they save
PREFIXES = ("module.", "_orig_mod.", "model.")  # of nn.DataParallel, torch.compile and modules around the network
AVERAGED = "n_averaged"  # what an AveragedModel of torch.optim.swa_utils has beside its weights
OURS = {  # a key of other files of ours -> what it is that has it
    "detector": "a detector that eval saved",
    "identity": "the state of a training that has not come to its end",
}


def save_network(path: Path, model: nn.Module, origin: dict) -> None:
    """Write the state dict of `model`, on the CPU, with `origin` (plain values) as its attribute."""
    state = model.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.detach().cpu().contiguous()
    state.origin = origin
    save_checkpoint(path, state)


def load_network(path: Path, model: nn.Module, what: str, expected: dict, remedy: str) -> dict:
    """Load a state dict strictly into `model`; return its origin ({} for a file of the first public code).

    Args:
        what: the network, for messages: "the classifier".
        expected: entries that the origin must have, where it has them at all.
        remedy: what to do about a wrong or missing file.

    Raises:
        UserError: the file is missing, damaged, or of another network, task or partition.
    """
    return fill_network(path, read_state(path, what, remedy), model, what, expected, remedy)


def read_state(path: Path, what: str, remedy: str) -> dict:
    """The state dict in `path`. What people have around one is looked through, which is said: a dict that holds it
    under one of `WRAPPERS`, and `PREFIXES` of its names.

    Raises:
        UserError: the file is missing, damaged or something else, or holds weights that are not finite.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; it should hold {what}. {remedy}")
    content = load_checkpoint(path)
    for key, name in OURS.items():
        if key in content:
            raise UserError(f"{path}: is {name}, not {what}. {remedy}")
    state = without_prefixes(path, unwrapped(path, content))
    if not holds_tensors(state):
        places = weights_within(state)
        if places:
            raise UserError(
                f"{path}: holds no weights itself; they seem to be in {listed(places)}. Save those of {what} alone, "
                "with torch.save"
            )
    check_values(path, state, remedy)
    return state


DEEPEST = 8  # dicts within dicts that are looked through


def unwrapped(path: Path, content: dict, depth: int = 0) -> dict:
    """What a dict holds under one of `WRAPPERS`, down to a depth, or itself."""
    keys = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if not keys or depth == DEEPEST:
        return content
    key = min(keys, key=lambda key: not holds_tensors(content[key]))
    print(f"{path}: took the weights that it holds as {key!r}", flush=True)
    return unwrapped(path, content[key], depth + 1)


def holds_tensors(content: dict) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def without_prefixes(path: Path, state: dict) -> dict:
    """A state dict without the prefixes that all its names have in common, and without `AVERAGED`."""
    removed = ""
    if AVERAGED in state:
        state = {name: value for name, value in state.items() if name != AVERAGED}
    while prefix := next((p for p in PREFIXES if state and all(str(name).startswith(p) for name in state)), ""):
        removed += prefix
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if removed:
        print(f"{path}: removed the prefix {removed} from its {len(state)} names", flush=True)
    return state


def weights_within(content: dict, place: str = "", depth: int = 0) -> list[str]:
    """Where dicts of tensors are in a dict, down to a depth: "['net']", "['nets']['classifier']"."""
    places = []
    for key, value in content.items():
        if isinstance(value, dict) and depth < DEEPEST:
            here = f"{place}[{key!r}]"
            places += [here] if holds_tensors(value) else weights_within(value, here, depth + 1)
    return places


def fill_network(path: Path, state: dict, model: nn.Module, what: str, expected: dict, remedy: str) -> dict:
    """The second half of `load_network`: check the state dict read from `path` and load it strictly."""
    origin = origin_of(state)
    kept = origin.get("val_fraction", 0.0)
    if not (fits(kept, float) and 0 <= kept < 1) or not is_plain(origin):
        raise UserError(f"{path}: what it says of how it was made is damaged. {remedy}")
    for key, value in expected.items():
        if origin.get(key, value) != value:
            raise UserError(f"{path}: was made for {key} {origin[key]}, expected {value}. {remedy}")
    ours = model.state_dict()
    missing, unknown = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys(), key=str)
    if missing or unknown:
        found = "; ".join(f"{kind} {listed(names)}" for kind, names in (("lacks", missing), ("has", unknown)) if names)
        raise UserError(f"{path}: is not {what} ({found}). {remedy}")
    for name, tensor in ours.items():
        found = state[name]
        if not isinstance(found, Tensor):
            raise UserError(f"{path}: {name} is of the kind {type(found).__name__}, expected a tensor. {remedy}")
        if found.shape != tensor.shape:
            raise UserError(
                f"{path}: {name} is {list(found.shape)}, expected {list(tensor.shape)}: "
                f"it is {what} of another task, number of classes or --networks. {remedy}"
            )
        if found.is_floating_point() != tensor.is_floating_point():  # to convert it would lose digits
            raise UserError(f"{path}: {name} holds {found.dtype}, expected {tensor.dtype}. {remedy}")
        if found.is_floating_point() and found.dtype != tensor.dtype and not found.to(tensor.dtype).isfinite().all():
            raise UserError(f"{path}: {name} holds numbers too large for {tensor.dtype}. {remedy}")
    model.load_state_dict({name: state[name] for name in ours})  # without what else a state dict says of its modules
    return origin


def weights_checksum(model: nn.Module) -> int:
    """By which a network that depends on another knows it again."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), checksum)
    return checksum


def origin_of(state: dict) -> dict:
    """How a state dict was made, or {} where that is not known."""
    origin = getattr(state, "origin", None)
    return origin if isinstance(origin, dict) else {}


def is_plain(content: object) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def listed(names: list[str], most: int = 8) -> str:
    """Names in one line; of many, the first ones and how many there are."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, … {len(names)} names"
