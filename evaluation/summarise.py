"""The mean over partitions (or seeds) of several results of `python -m eval`.

python -m evaluation.summarise results/same_dataset_mnist_partition*_seed123.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils import UserError, run_command


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "evaluation.summarise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files that eval wrote")
    return parser


def main(args: argparse.Namespace) -> None:
    from evaluation.report import FIGURES, IND_FIGURES, format_ind_table, format_table, means
    from evaluation.results import left_out, read_result

    results = [read_result(path) for path in args.results]
    first, seen, without = results[0], set(), left_out(results)
    for path, result in zip(args.results, results, strict=True):
        for key in ("task", "config"):
            if result[key] != first[key]:
                raise UserError(
                    f"{path} is of another {difference(key, result[key], first[key])} than {args.results[0]}: there is "
                    "no mean of unlike results"
                )
        runs = {(result["partition"], seed) for seed in result["seeds"]}
        if runs & seen:
            partition, seed = min(runs & seen)
            raise UserError(f"{path}: {partition} with seed {seed} is in a file before it: name each result once")
        seen |= runs
        for key in ("method", "ood_dataset"):
            names, expected = ({row[key] for row in one["detection"]} for one in (result, first))
            if names - without.keys() != expected - without.keys():
                odd = min((names ^ expected) - without.keys())
                raise UserError(
                    f"{odd} is in one of {path} and {args.results[0]} only: make both with the same options"
                )
    print(f"Mean ± standard deviation over {len(results)} results of {first['task']}, each the mean of its seeds\n")
    rows = [[row for row in result["detection"] if row["method"] not in without] for result in results]
    detection = [means(of_result, ("ood_dataset", "method", "at"), FIGURES) for of_result in rows]
    ind = [means(result["ind"], ("method", "at"), IND_FIGURES) for result in results]
    print(f"{format_table(sum(detection, []), without)}\n\n{format_ind_table(sum(ind, []))}")


def difference(key: str, one: object, other: object) -> str:
    """What is unlike in two tasks or configurations: "config (epochs 1, 15)"."""
    if isinstance(one, dict) and isinstance(other, dict):
        unlike = [
            f"{name} {one.get(name)}, {other.get(name)}" for name in one | other if one.get(name) != other.get(name)
        ]
    else:
        unlike = [f"{one}, {other}"]
    return f"{key} ({'; '.join(unlike)})"


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
