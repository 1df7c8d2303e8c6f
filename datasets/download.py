"""Fetch, import and verify the published data sets.

    python -m datasets.download cifar10 SVHN            into ./datasets
    python -m datasets.download all --data-dir D
    python -m datasets.download LSUN-FIX --from LSUN_fix.tar.gz
    python -m datasets.download --check                 what is complete, wrong or missing

An interrupted download goes on when the same command is given again. Exit status 1: --check found something wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.errors import UserError, run_command
from datasets.obtain import is_present, obtain, verify
from datasets.sources import SOURCES, find_source


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "datasets.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="Data sets to fetch, or all; an unknown name lists them"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("datasets"), help="Folder of the images (default: ./datasets)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Fetch nothing: verify the files that are there (default: of all data sets)",
    )
    parser.add_argument(
        "--from",
        dest="given",
        type=Path,
        metavar="FILE|DIR",
        help="Import this archive, file or folder instead of fetching",
    )
    return parser


def main(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises `UserError`."""
    names = resolve(args.names or ["all"] * args.check)
    if args.check:
        if args.given:
            raise UserError("--check reads --data-dir only; leave out --from")
        states = check(names, args.data_dir)
        bad = {"wrong", "missing"} if args.names and "all" not in args.names else {"wrong"}
        return int(bool(bad & states))
    if args.given and not args.given.exists():
        raise UserError(f"--from {args.given}: no such file or folder")
    if args.given and args.given.is_file() and len(names) > 1:
        raise UserError(f"--from {args.given}: is one file; name the one data set that it holds")
    fetch_all(names, args.data_dir, args.given)
    return 0


def resolve(names: list[str]) -> list[str]:
    """Names as the user may write them -> keys of `SOURCES`, without repetition. Raises `UserError` for others."""
    found = {name: list(SOURCES) if name == "all" else [find_source(name)] for name in names}
    unknown = [name for name, keys in found.items() if None in keys]
    if unknown or not names:
        what = f"{unknown[0]}: no such data set" if unknown else "name the data sets to fetch"
        raise UserError(f"{what}; expected all or some of {', '.join(SOURCES)} (the digits need no download)")
    return list(dict.fromkeys(key for keys in found.values() for key in keys))


def fetch_all(names: list[str], data_dir: Path, given: Path | None) -> None:
    """Obtain each data set; one that fails does not stop the others.

    Raises:
        UserError: the only failure, or the names of those that failed.
    """
    failures = {}
    for name in names:
        try:
            done = obtain(name, data_dir, given=given)
        except UserError as error:
            failures[name] = error
            if len(names) > 1:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        counts = ", ".join(f"{count:,} {split}" for split, count in SOURCES[name].counts.items())
        print(f"{name}: {f'complete ({counts} images)' if done else 'was there already (see --check)'}", flush=True)
    if failures:
        raise (
            next(iter(failures.values()))
            if len(names) == 1
            else UserError(
                f"{len(failures)} of {len(names)} could not be obtained: {', '.join(failures)}; see the messages above"
            )
        )


def check(names: list[str], data_dir: Path) -> set[str]:
    """Print a line for each split of each data set. Returns the states met: complete, wrong, missing."""
    states = set()
    print(f"{'data set':<14}{'split':<7}{'images':>7}  state")
    for name in names:
        for split, expected in SOURCES[name].counts.items():
            state, remark, count = "missing", f"python -m datasets.download {name} --data-dir {data_dir}", ""
            try:
                if is_present(name, data_dir, split):
                    count, state, remark = f"{verify(name, data_dir, split)['count']:,}", "complete", ""
            except UserError as error:
                state, remark = "wrong", str(error)
            states.add(state)
            print(
                f"{name:<14}{split:<7}{count or f'{expected:,}':>7}  {state}{': ' * bool(remark)}{remark}", flush=True
            )
    return states


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
