"""Tables and pictures of a reproduction: what `python -m reproduce` leaves beside the folders of its jobs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cli.files import write_json, write_text
from cmg.losses import MODES
from cmg.scores import PRETRAINED_SCORES
from evaluation.figure_style import figure_bytes, save_figure
from evaluation.page import Code, Facts, Heading, Picture, Section, Table, Text, write_page
from evaluation.plots import auroc_over_steps, roc_curves, score_histograms, sweep
from evaluation.report import (
    IND_TEST,
    PRETRAINED,
    PSEUDO,
    THE_METHOD,
    aggregate,
    cell,
    heads_left_alone,
    left_out,
    markdown,
    means,
)
from reproduction import tables
from reproduction.results import read_ablations
from reproduction.tables import JobResult

SWEEPS = {  # option of eval -> what it is
    "--sigma": "sigma, standard deviation of the latents of pseudo-OOD images",
    "--mixing-probability": "probability of the first class in each dimension of the embedding",
}
DIFFERENCES = (
    "AUROC of CMG after the last step minus that of the best of the pretrained classifier's detectors, which is chosen "
    "by its mean on these test images. The interval is a paired bootstrap over the images, the networks as they are."
)
STEPS = "AUROC in per cent while the head is tuned; mean ± standard deviation over the runs."
ABLATIONS = "AUROC on {ood}; first partition and training seed; mean ± standard deviation over seeds of stage 2."


def write_report(
    folder: Path,
    about: dict,
    results: Sequence[JobResult],
    first: str,
    samples: Path | None,
    ablations: Path | None,
) -> str:
    """Write table.md, .csv and .json, the pictures and report.html into `folder`.

    Args:
        about: "task", "command" and whatever else the files say of how they were made.
        results: of the jobs that are done, at least one; pictures are of the first.
        first: the sentence that everything begins with.
        samples, ablations: what the first job made of these, if it is done.

    Returns:
        the table of detection, in Markdown, and a remark under it where heads stayed as they were.
    """
    summary, ind = tables.detection_summary(results), tables.ind_summary(results)
    compared = tables.differences(results, summary)
    contents = [one.content for one in results]
    changes = read_ablations(ablations) if ablations else None
    rows = [{"partition": one.partition} | row for one in results for row in one.content["detection"]]
    steps = tables.steps_summary(results)
    found = {
        "detection": summary,
        "ind": ind,
        "differences": compared,
        "left_out": left_out(contents),
        "unchanged": tables.unchanged(results),
        "steps": steps,
        "rows": rows,
    }
    write_json(folder / "table.json", about | found)
    tables.write_csv(folder / "table.csv", summary)
    pictures = draw(folder, results, samples, changes)
    parts = {
        "Detection": (tables.detection_cells(summary), tables.notes(summary, contents)),
        "The best of the others": (tables.difference_cells(compared), DIFFERENCES),
        "Classification": (tables.ind_cells(ind), ""),
    }
    if steps:
        parts["AUROC over steps"] = (tables.steps_cells(steps), STEPS)
    if changes:
        parts["Ablations"] = (ablation_cells(changes), ABLATIONS.format(ood=first_ood(changes)))
    text = [f"# CMG: {about['task']}", first, f"```sh\n{about['command']}\n```"]
    text += [f"## {name}\n\n{markdown(*cells)}\n\n{note}".rstrip() for name, (cells, note) in parts.items()]
    text.append("\n".join(f"* {name}: {value}" for name, value in facts(about).items()))
    write_text(folder / "table.md", "\n\n".join(text) + "\n")

    sections: list[Section] = [Text(first)]
    for name, (cells, note) in parts.items():
        sections += [Heading(name), Table(*cells), *([Text(note)] if note else [])]
    sections += [Heading("Pictures"), *pictures]
    sections += [Heading("How this was made"), Code(about["command"]), Facts(facts(about))]
    write_page(folder / "report.html", f"CMG: {about['task']}", sections)
    return "\n\n".join(filter(None, [markdown(*parts["Detection"][0]), heads_left_alone(contents)]))


def facts(about: dict) -> dict[str, object]:
    """How the results were made, by name."""
    minutes = {name: f"{about[name] / 60:.1f} min" for name in ("wall_seconds", "job_seconds")}
    return about["environment"] | {
        "runs": f"{about['done']} of {about['jobs']} done",
        "wall time": f"{minutes['wall_seconds']} of the last call; {minutes['job_seconds']} of the runs, one by one",
    }


def ablation_cells(changes: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of ablations: the first OOD set, the last step."""
    ood = first_ood(changes)
    modes = list(dict.fromkeys(row["method"] for one in changes["variants"].values() for row in one["detection"]))
    rows = []
    for variant, one in changes["variants"].items():
        last = [row for row in one["detection"] if row["at"] == "last" and row["ood_dataset"] == ood]
        found = {row["method"]: row for row in aggregate(last, ("method",), ["auroc"])}
        rows.append([variant or THE_METHOD, *(cell(found[mode]["auroc"]) for mode in modes)])
    return ["options of eval", *(f"{mode}, AUROC last" for mode in modes)], rows


# --- pictures -----------------------------------------------------------------------------------


def draw(folder: Path, results: Sequence[JobResult], samples: Path | None, changes: dict | None) -> list[Picture]:
    """Draw everything, write it to `folder`/figures as PNG, and return it for the page."""
    first = results[0]
    ood = first.content["detection"][0]["ood_dataset"]
    of_partition = [result for result in results if result.partition == first.partition]
    where = f"{first.partition}, training seed {first.seed}"
    config = first.content["config"]
    figures, tuned = {}, {}
    for run in first.content["runs"]:
        tuned.setdefault(run["mode"], run)
    for mode, run in tuned.items():
        sets = {IND_TEST: IND_TEST, PSEUDO: PSEUDO, ood: f"OOD: {ood}"}
        scores = {label: first.of(mode, "last", name)[0] for name, label in sets.items()}
        margins = run["margins"] and (run["margins"]["m_in"], run["margins"]["m_out"])
        caption = f"Scores of {mode} after the last step; {where}."
        figures[f"scores_{mode}"] = (
            score_histograms(mode, scores, config["score"] or MODES[mode].score, margins, config["loss_energy"]),
            caption,
        )
    detectors = {row["method"]: PRETRAINED for row in first.content["detection"] if is_baseline(row, ood)}
    detectors |= dict.fromkeys(tuned, "last")
    curves = {
        name: tuple(first.of(name, at, images)[0] for images in (IND_TEST, ood)) for name, at in detectors.items()
    }
    figures["roc"] = (roc_curves(curves, ood), f"ROC curves against {ood}, CMG after the last step; {where}.")
    if runs := tables.at_all_steps([run for result in of_partition for run in result.content["runs"]]):
        caption = f"AUROC on {ood} while the head is tuned; {first.partition}, each line a seed."
        figures["steps"] = (auroc_over_steps(runs, ood, pretrained_means(of_partition, ood)), caption)
    for option, label in SWEEPS.items() if changes else ():
        points = sweep_points(changes, option)
        if all(len(of_mode) > 1 for of_mode in points.values()):
            count = min(len(shares) for of_mode in points.values() for shares in of_mode.values())
            spread = f" (mean ± standard deviation of {count} seeds of stage 2)" if count > 1 else ""
            caption = f"AUROC on {ood} after the last step against {option}{spread}; {where}."
            figures[option.strip("-")] = (
                sweep(points, label, own_value(changes, option), pretrained_means([first], ood)),
                caption,
            )
    pictures = []
    if samples:
        pictures.append(Picture(samples.read_bytes(), "IND images, reconstructions and pseudo-OOD images", f"{where}."))
    for name, (figure, caption) in figures.items():
        save_figure(figure, folder / "figures" / f"{name}.png")
        pictures.append(Picture(figure_bytes(figure), caption, caption))
    return pictures


def pretrained_means(results: Sequence[JobResult], ood: str) -> dict[str, float]:
    """The mean AUROC of MSP and energy before fine-tuning."""
    rows = [row for result in results for row in result.content["detection"] if is_baseline(row, ood)]
    return {
        row["method"]: row["auroc"]
        for row in means(rows, ("method",), ("auroc",))
        if row["method"] in PRETRAINED_SCORES
    }


def is_baseline(row: dict, ood: str) -> bool:
    return row["at"] == PRETRAINED and row["ood_dataset"] == ood


def first_ood(changes: dict) -> str:
    """The OOD set that the ablations are shown for."""
    return changes["pretrained"][0]["ood_dataset"]


def own_value(changes: dict, option: str) -> float:
    """The value of an option that the method itself has."""
    return changes["config"][option.strip("-").replace("-", "_")]


def sweep_points(changes: dict, option: str) -> dict[str, dict[float, list[float]]]:
    """Mode -> value of the option -> AUROC of each seed, of the variants that change this option alone."""
    ood = first_ood(changes)
    points: dict[str, dict[float, list[float]]] = {}
    for variant, one in changes["variants"].items():
        words = shlex.split(variant)
        if words and (words[0] != option or len(words) != 2):
            continue
        value = float(words[1]) if words else own_value(changes, option)
        for row in one["detection"]:
            if row["at"] == "last" and row["ood_dataset"] == ood:
                points.setdefault(row["method"], {}).setdefault(value, []).append(row["auroc"])
    return points
