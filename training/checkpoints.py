"""Checkpoints of networks: plain state dicts, as the first public code reads and writes them.

How a checkpoint was made rides along as an attribute of the state dict, which `load_state_dict` does not see.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from utils import UserError, load_checkpoint, save_checkpoint

PARALLEL = "module."


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
    """The state dict in `path`, without the prefix `module.` that nn.DataParallel puts before every name.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; it should hold {what}. {remedy}")
    state = load_checkpoint(path)
    if state and all(str(name).startswith(PARALLEL) for name in state):
        print(f"{path}: took the prefix {PARALLEL} off its {len(state)} names", flush=True)
        state = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    return state


def fill_network(path: Path, state: dict, model: nn.Module, what: str, expected: dict, remedy: str) -> dict:
    """The second half of `load_network`: check the state dict read from `path` and load it strictly."""
    origin = getattr(state, "origin", {})
    for key, value in expected.items():
        if origin.get(key, value) != value:
            raise UserError(f"{path}: was made for {key} {origin[key]}, expected {value}. {remedy}")
    ours = model.state_dict()
    missing, unknown = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys(), key=str)
    if missing or unknown:
        found = "; ".join(f"{kind} {listed(names)}" for kind, names in (("lacks", missing), ("has", unknown)) if names)
        raise UserError(f"{path}: is not {what} ({found}). {remedy}")
    for name, tensor in ours.items():
        if getattr(state[name], "shape", None) != tensor.shape:
            found = list(getattr(state[name], "shape", []))
            raise UserError(
                f"{path}: {name} is {found}, expected {list(tensor.shape)}: "
                f"{what} of another task or number of classes. {remedy}"
            )
    model.load_state_dict(state)
    return origin


def listed(names: list[str], most: int = 8) -> str:
    """Names in one line; of many, the first ones and how many there are."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, … {len(names)} names"
