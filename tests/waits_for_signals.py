"""A command for the tests of jobs: notes its process when it starts, and waits to be stopped the first two times."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("waits")
    parser.add_argument("file", type=Path)
    return parser


def main(args: argparse.Namespace) -> None:
    starts = args.file.with_name(f"{args.file.name}.starts")
    with open(starts, "a") as file:
        file.write(f"{os.getpid()}\n")
    while len(starts.read_text().splitlines()) < 3:
        time.sleep(0.05)
    args.file.write_text("waited")
