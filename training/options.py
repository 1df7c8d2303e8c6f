"""What the options of several commands have in common, and those of train and eval that another command hands on, in
quotes: --eval-args='--epochs 1'.

Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from utils import UserError

LEARNING_RATE = 1e-3  # of Adam in stage 1


def split_options(flag: str, text: str) -> list[str]:
    """The words of `text`, as a shell splits them. Raises `UserError`, which names `flag`."""
    try:
        return shlex.split(text)
    except ValueError as error:  # a quote that does not end, or nothing behind a backslash
        raise UserError(f"{flag}: {text!r} cannot be split into options: {str(error).lower()}") from None


def parse_options(
    flag: str, parser: argparse.ArgumentParser, words: Sequence[str], namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """`parser.parse_args`, but what it does not take is a `UserError`, which names `flag`."""

    def refuse(message: str) -> None:
        raise UserError(f"{flag}: {message}")

    parser.error = refuse
    return parser.parse_args(words, namespace)


def check_options(flag: str, text: str, parser: argparse.ArgumentParser, refused: Mapping[str, str]) -> list[str]:
    """The words of `text`, once it is certain that the parser takes them.

    Args:
        refused: name in the namespace of each option that must not be among them -> what to do instead.

    Raises:
        UserError: the parser does not take them, or one is refused; it names `flag`.
    """
    words = split_options(flag, text)
    parsed = parse_options(flag, parser, words, argparse.Namespace(**dict.fromkeys(refused)))  # None: it was not given
    for name, instead in refused.items():
        if getattr(parsed, name) is not None:
            raise UserError(f"{flag}: no {option(name)} here: {instead}")
    return words


def option(name: str) -> str:
    """ "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"
