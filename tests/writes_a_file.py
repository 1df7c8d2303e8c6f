"""A command for the tests of jobs: writes a word to a file, or fails."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from cli.errors import UserError


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("writes")
    parser.add_argument("file", type=Path)
    parser.add_argument("--ind-dir")
    parser.add_argument("--word", default=os.environ.get("WORD", ""))
    return parser


def main(args: argparse.Namespace) -> None:
    if args.word == "fail":
        raise UserError("asked to fail")
    if args.word == "crash":
        raise ZeroDivisionError("nobody foresaw it")
    if args.word == "killed":
        os.write(2, b"to the log though no part of Python\n")
        os.kill(os.getpid(), signal.SIGKILL)
    args.file.write_text(args.word)
