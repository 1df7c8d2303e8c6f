"""What `python -m reproduction.ablations` does once its arguments are read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean

from cli.files import check_outputs, write_json
from cmg.config import Request, config_for
from cmg.evaluate import describe, load, precision_of
from cmg.stage2 import run_stage2
from datasets.obtain import files_read
from evaluation.report import NO_OOD, PRETRAINED, PSEUDO, THE_METHOD, heads_left_alone, markdown, mean_and_sd
from utils import start_computing

HEADER = ("options of eval", "mode", "start", "best (step)", "validated (step)", "last", "IND accuracy", "seconds")


def ablate(request: Request, variants: Mapping[str, Mapping[str, object]], output: Path) -> dict:
    """Run every variant, given by its options of stage 2, on the same networks, and write `output`.

    Returns:
        "pretrained": detection rows of the classifier before fine-tuning; "variants": for each variant its
        "config", "detection" and "ind" rows, "runs" and "seconds".
    """
    images = partial(files_read, request.experiment, request.machine.data_dir, request.ood_names)
    check_outputs(output, inputs=request.paths.values(), images=images)
    device = start_computing(request.machine.device)
    precision = precision_of(request, device)
    inputs = load(request, device)
    found = {"pretrained": [], "variants": {}}
    banks = {}
    for variant, options in variants.items():
        start = time.monotonic()
        config = config_for(request.experiment, precision, **options)
        results = run_stage2(inputs, config, request.modes, request.seeds, banks=banks)
        tables = results.tables()
        taken = round(time.monotonic() - start, 1)
        found["pretrained"] = [row for row in tables["detection"] if row["at"] == PRETRAINED]
        kept = {key: [row for row in tables[key] if row["at"] != PRETRAINED] for key in ("detection", "ind")}
        found["variants"][variant] = {"config": asdict(results.config), "seconds": taken, "runs": tables["runs"]} | kept
        print(f"{variant or THE_METHOD}: {taken:.0f} s", flush=True)
        if remark := heads_left_alone([tables]):
            print(remark, flush=True)
    method = {"config": asdict(config_for(request.experiment, precision, **request.options))}
    write_json(output, describe("reproduction.ablations", request, inputs, device) | method | found)
    return found


def table(results: dict) -> str:
    """In Markdown, for each OOD set: a row for each variant and mode, then for each score of the pretrained classifier.
    And a remark where they are pseudo-OOD samples."""
    sets = list(dict.fromkeys(row["ood_dataset"] for row in results["pretrained"]))
    headings = [f"{ood}:\n\n" if len(sets) > 1 else "" for ood in sets]
    tables = [heading + table_of(results, ood) for heading, ood in zip(headings, sets, strict=True)]
    return "\n\n".join([*tables, NO_OOD] if sets == [PSEUDO] else tables)


def table_of(results: dict, ood: str) -> str:
    """The part of the table for one OOD set."""
    rows = [
        [f"`{variant}`" if variant else THE_METHOD, mode, *cells(result, mode, ood), format(result["seconds"], ".0f")]
        for variant, result in results["variants"].items()
        for mode in dict.fromkeys(run["mode"] for run in result["runs"])
    ]
    rows += [
        ["pretrained classifier", row["method"], f"{100 * row['auroc']:.2f}", *["-"] * (len(HEADER) - 3)]
        for row in results["pretrained"]
        if row["ood_dataset"] == ood
    ]
    return markdown(HEADER, rows)


def cells(result: dict, mode: str, ood: str) -> list[str]:
    """A mode's cells in the table: AUROC at four places, IND accuracy after the last step."""
    last = [
        row["auroc"]
        for row in result["detection"]
        if (row["method"], row["at"], row["ood_dataset"]) == (mode, "last", ood)
    ]
    accuracy = [row["accuracy"] for row in result["ind"] if (row["method"], row["at"]) == (mode, "last")]
    start, best, validated = [], [], []
    for run in result["runs"]:
        if run["mode"] == mode and run["curve"]:
            curve = [(check["auroc"][ood], check["step"]) for check in run["curve"]]
            start.append(curve[0][0])
            best.append(max(curve, key=lambda point: (point[0], -point[1])))
            validated += [point for point in curve if point[1] == run["validated_step"]]

    def at_steps(points: list[tuple[float, int]]) -> str:
        step = f" ({mean(step for _, step in points):.0f})" if points else ""
        return mean_and_sd([auroc for auroc, _ in points]) + step

    return [mean_and_sd(start), at_steps(best), at_steps(validated), mean_and_sd(last), mean_and_sd(accuracy)]
