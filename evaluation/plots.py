"""Figures of images, scores and AUROC: plain data in, a matplotlib figure out.

AUROC comes in as a share, as metrics and result files have it, and is drawn in per cent; OOD is the positive class and
a larger score means more likely OOD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import roc_curve

from evaluation.figure_style import GREY, INK, KINDS, LIGHT, OURS, PIXELS, line_styles, new_figure, styled
from evaluation.metrics import auroc
from evaluation.report import THE_METHOD, mean_and_sd, spread

# --- images -------------------------------------------------------------------------------------

COLUMNS = 12
TILE, GAP = 96, 4  # pixels of a PNG file: the most that an image takes, and what is left between two
MARGIN, LABEL = 8, 56  # around everything, and for the line above each kind


@styled
def sample_grid(kinds: Mapping[str, torch.Tensor]) -> Figure:
    """Images kind by kind, 12 on a line, the kind's name above them.

    Args:
        kinds: name -> images [N, C, S, S] with one or three channels, uint8 or floats in [0, 1]. Sizes may differ.

    Each pixel becomes a square of whole pixels of the PNG file: nothing is smoothed.
    """
    grids = {kind: tile(images) for kind, images in kinds.items()}
    width = max(grid.shape[1] for grid in grids.values()) + 2 * MARGIN
    height = sum(LABEL + grid.shape[0] for grid in grids.values()) + MARGIN
    figure, bottom = Figure((width / PIXELS, height / PIXELS)), height
    for kind, grid in grids.items():
        bottom -= LABEL + grid.shape[0]
        box = MARGIN / width, bottom / height, grid.shape[1] / width, grid.shape[0] / height
        axes = figure.add_axes(box, label=kind)
        axes.imshow(grid, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(MARGIN / width, (bottom + grid.shape[0] + 3 * GAP) / height, kind, fontsize=9)
    return figure


def tile(images: torch.Tensor) -> np.ndarray:
    """Images [N, C, S, S], uint8 or in [0, 1], as one picture, uint8 [H, W, 3]: white between them, each enlarged."""
    if not images.is_floating_point():
        images = images / 255
    images = images.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    count, _, side, _ = images.shape
    scale = max(1, TILE // side)
    step, columns, lines = side * scale + GAP, min(count, COLUMNS), -(-count // COLUMNS)
    picture = np.full((lines * step - GAP, columns * step - GAP, 3), 255, np.uint8)
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2).permute(0, 2, 3, 1).numpy()
    for n, image in enumerate(enlarged):
        top, left = n // COLUMNS * step, n % COLUMNS * step
        picture[top : top + side * scale, left : left + side * scale] = image
    return picture


# --- scores -------------------------------------------------------------------------------------

BINS = 40
REACH = 0.002  # share of each kind's scores, at either end, that may lie beyond the axis
LEAST = 1e-16  # probability of which log-odds are taken, or by which one may fall short of 1
SCORE_NAMES = {
    "energy-ind": "−logsumexp of the IND logits",
    "energy-all": "−logsumexp of all logits",
    "ood-slot": "probability of the OOD slot",
    "msp-ind": "1 − largest softmax probability of an IND class",
}
MARGIN_NAMES = (r"$m_\mathrm{in}$", r"$m_\mathrm{out}$")
MARGINS_NOTE = f"{MARGIN_NAMES[0]} and {MARGIN_NAMES[1]}: margins of the loss."
BEYOND_NOTE = "The outermost bins hold what lies beyond them too."


@styled
def score_histograms(
    detector: str,
    scores: Mapping[str, Sequence[float]],
    score: str,
    margins: tuple[float, float] | None = None,
    loss_energy: str = "all",
) -> Figure:
    """How one detector scores up to three kinds of images.

    Args:
        scores: kind of images -> scores [N], IND images first: the legend tells the AUROC of the others against them.
        score: its OOD score, a key of `cmg.scores.SCORES`.
        margins: m_in and m_out of CMG-energy, marked where the score is an energy.
        loss_energy: logits of the energies that the margins are, "all" or "ind".

    Probabilities, which is what scores all within [0, 1] are, are drawn as log-odds: nearly all are close to 0 or 1.
    """
    scores = {kind: _checked(kind, values) for kind, values in scores.items()}
    (_, ind), *others = scores.items()
    legend = {kind: f"{kind}\nn = {len(part):,}" for kind, part in scores.items()}
    legend |= {kind: f"{legend[kind]}\nAUROC {_per_cent(_auroc(ind, part))}" for kind, part in others}
    name = f"{detector} score: {SCORE_NAMES.get(score, score)}"
    if all(part.min() >= 0 and part.max() <= 1 for part in scores.values()):
        scores, name = {kind: log_odds(part) for kind, part in scores.items()}, f"{name}, as log-odds"
    if not score.startswith("energy-"):
        margins = None
    edges = bin_edges([*scores.values()], margins or ())
    notes = [MARGINS_NOTE] if margins else []
    if margins and score != f"energy-{loss_energy}":
        notes[0] += f" They are energies: {SCORE_NAMES[f'energy-{loss_energy}']}."
    if any(part.min() < edges[0] or part.max() > edges[-1] for part in scores.values()):
        notes.append(BEYOND_NOTE)

    figure, axes = new_figure(3.9)
    for (kind, part), style in zip(scores.items(), KINDS[: len(scores)], strict=True):
        share = 100 * np.histogram(part.clip(edges[0], edges[-1]), edges)[0] / len(part)
        axes.stairs(share, edges, fill=True, alpha=0.25, color=style["color"])
        axes.stairs(share, edges, baseline=None, label=legend[kind], linewidth=1.6, **style)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None), ylabel="images of the kind, % in each bin")
    axes.set_xlabel(f"{name}\nlarger: more likely OOD")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=len(KINDS), borderaxespad=0, borderpad=0)
    for margin, label in zip(margins or (), MARGIN_NAMES, strict=False):
        _mark_value(axes, margin, label, "right" if margin == min(margins) else "left")
    figure.supxlabel("\n".join(notes), fontsize=8, color=GREY, x=0.012, ha="left", linespacing=1.3, parse_math=True)
    return figure


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), between those of 1e-16 and of the largest number below 1."""
    p = probabilities.clip(LEAST, 1 - LEAST)
    return np.log(p) - np.log1p(-p)


def bin_edges(kinds: Sequence[np.ndarray], include: Sequence[float] = ()) -> np.ndarray:
    """The edges of 40 equal bins, from the least to the greatest of all kinds' 0.2 and 99.8 per cent points.

    So a few scores far out do not squeeze the rest. The bins hold every value of `include`.
    """
    points = [*include, *(point for kind in kinds for point in np.quantile(kind, (REACH, 1 - REACH)))]
    low, high = min(points), max(points)
    return np.linspace(low, high, BINS + 1) if low < high else np.linspace(low - 0.5, high + 0.5, BINS + 1)


CROWDED = 6  # detectors that can still be told apart


@styled
def roc_curves(detectors: Mapping[str, tuple[Sequence[float], Sequence[float]]], ood_name: str = "OOD") -> Figure:
    """Receiver operating characteristics of several detectors on the same images, the best named first.

    Args:
        detectors: name -> scores of the IND images [N] and of the OOD images [M].
        ood_name: what to call the OOD images.

    From seven detectors on only CMG's have colours of their own: the others are grey, and the best of them is named.
    """
    pairs = {name: tuple(_checked(name, part) for part in pair) for name, pair in detectors.items()}
    areas = {name: _auroc(*pair) for name, pair in pairs.items()}
    names = sorted(areas, key=areas.get, reverse=True)
    crowd = [name for name in names if not name.startswith(OURS)] if len(names) > CROWDED else []
    named = [name for name in names if name not in crowd]
    styles = line_styles([name for name in detectors if name in named])
    styles |= dict.fromkeys(crowd, {"color": LIGHT, "linewidth": 1.2, "zorder": 1.5})
    legend = {name: f"{name}\nAUROC {_per_cent(areas[name])}" for name in named} | {name: f"_{name}" for name in crowd}
    if crowd:
        best, *rest = crowd
        styles[best] = {"color": INK, "linestyle": (0, (4, 1, 1, 1)), "zorder": 1.9}
        legend[best] = f"{best}, best of {len(crowd)} others\nAUROC {_per_cent(areas[best])}"
    if crowd[1:]:
        spread = f"{100 * areas[rest[-1]]:.2f} to {_per_cent(areas[rest[0]])}"
        legend[rest[0]] = f"the remaining {len(rest)}\nAUROC {spread}"

    figure, axes = new_figure(4.1)
    axes.plot([0, 100], [0, 100], color=LIGHT, linewidth=1, linestyle=":", zorder=1, label="_chance")
    axes.text(52, 47, "chance", color=GREY, fontsize=8, rotation=45, rotation_mode="anchor", va="top", ha="center")
    for name in [*named, *crowd]:
        ind, ood = pairs[name]
        truth, scores = np.repeat([0, 1], [len(ind), len(ood)]), np.concatenate([ind, ood])
        false_positives, true_positives, _ = roc_curve(truth, scores)
        axes.plot(100 * false_positives, 100 * true_positives, label=legend[name], **styles[name] | {"marker": ""})
    axes.set(xlim=(-1, 101), ylim=(-1, 101), xticks=range(0, 101, 20), yticks=range(0, 101, 20))
    axes.set(xlabel="IND images taken for OOD, %", ylabel=f"{ood_name} images detected, %")
    axes.set_aspect("equal", anchor="W")
    axes.grid(True, axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1.03, 0.5), labelspacing=0.9, borderaxespad=0)
    return figure


def _checked(name: str, values: Sequence[float]) -> np.ndarray:
    """Scores as an array of fp64. Raises `ValueError` where there are none or some are not finite."""
    values = np.asarray(torch.as_tensor(values, dtype=torch.float64).cpu())
    if not (values.size and np.isfinite(values).all()):
        raise ValueError(f"the scores of {name} are {'not all finite' if values.size else 'none'}")
    return values


def _auroc(ind: np.ndarray, ood: np.ndarray) -> float:
    return auroc(torch.from_numpy(ind), torch.from_numpy(ood))


def _per_cent(share: float) -> str:
    return f"{100 * share:.2f} %"


# --- AUROC over steps and options ---------------------------------------------------------------

MARKS = {  # points of a run: how they look, and what the legend says of them
    "max": ({"marker": "^", "markersize": 6, "markerfacecolor": "white"}, "max (selected on test images)"),
    "validated": ({"marker": "D", "markersize": 7, "markerfacecolor": "none"}, "validated (selected without them)"),
    "last": ({"marker": "o", "markersize": 4.5}, "last"),
}


@styled
def auroc_over_steps(runs: Sequence[Mapping], ood_dataset: str, baselines: Mapping[str, float] | None = None) -> Figure:
    """The AUROC of every evaluation over the steps of fine-tuning: the mean over the seeds, and each seed thinner.

    Marked for each seed: "last", after the last step; "max", the best evaluation, which is selected on the test images;
    "validated", at the step chosen without them, where there is one.

    Args:
        runs: as in the "runs" of eval's result files; the runs of a mode evaluated at the same steps.
        ood_dataset: which AUROC.
        baselines: name -> AUROC of the pretrained classifier.
    """
    figure, axes = new_figure(3.8)
    ends, used = [], set()
    for mode, style in line_styles(list(dict.fromkeys(run["mode"] for run in runs))).items():
        members = [run for run in runs if run["mode"] == mode]
        steps = [check["step"] for check in members[0]["curve"]]
        curves = 100 * np.array([[check["auroc"][ood_dataset] for check in run["curve"]] for run in members])
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        axes.plot(steps, curves.mean(0), label=mode, zorder=2.5, **line)
        for run, curve in zip(members, curves, strict=True):
            name = f"{mode}, seed {run['seed']}"
            axes.plot(steps, curve, label=name, color=style["color"], linewidth=0.8, alpha=0.35)
            points = {"max": curve.argmax(), "last": -1}
            if run["validated_step"] is not None:
                points["validated"] = steps.index(run["validated_step"])
            for mark, at in points.items():
                look = MARKS[mark][0] | {"color": style["color"], "linestyle": "", "zorder": 3, "clip_on": False}
                axes.plot([steps[at]], [curve[at]], label=f"{name}: {mark}", **look)
            used |= set(points)
        ends.append((curves[:, -1].mean(), f"{mode}\nlast {mean_and_sd([*curves[:, -1] / 100])}", style["color"]))
    axes.set_xlim(0, max(1, *(run["curve"][-1]["step"] for run in runs)))
    axes.set_xlabel("optimizer steps of fine-tuning")
    _explain_marks(axes, [mark for mark in MARKS if mark in used])
    _name_lines(axes, ends, baselines, f"AUROC on {ood_dataset}, %")
    return figure


def _explain_marks(axes: Axes, marks: Sequence[str]) -> None:
    """A legend above the axes, in grey: a mark means the same in every colour."""
    looks = {MARKS[mark][1]: MARKS[mark][0] | {"color": GREY, "linestyle": ""} for mark in marks}
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.02), "ncols": len(marks), "borderaxespad": 0, "borderpad": 0}
    axes.legend(handles=handles, handlelength=1, handletextpad=0.4, columnspacing=1.6, **place)


@styled
def sweep(
    modes: Mapping[str, Mapping[float, Sequence[float]]],
    option: str,
    own: float | None = None,
    baselines: Mapping[str, float] | None = None,
) -> Figure:
    """AUROC after the last step against the values of one option: mean and standard deviation over the seeds.

    Args:
        modes: mode -> value of the option -> AUROC of each seed.
        option: what to call it, with its unit where it has one.
        own: the method's own value, to be marked.
        baselines: name -> AUROC of the pretrained classifier.
    """
    figure, axes = new_figure(3.6)
    ends = []
    for mode, style in line_styles(list(modes)).items():
        points = [(value, [100 * share for share in shares]) for value, shares in sorted(modes[mode].items())]
        spreads = [spread(shares) for _, shares in points]
        means, deviations = [one["mean"] for one in spreads], [one["sd"] for one in spreads]
        axes.errorbar([value for value, _ in points], means, deviations, label=mode, capsize=3, elinewidth=1.2, **style)
        ends.append((means[-1], mode, style["color"]))
    values = sorted({value for points in modes.values() for value in points})
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(option)
    if own is not None:
        _mark_value(axes, own, THE_METHOD)
    _name_lines(axes, ends, baselines, "AUROC after the last step, %")
    return figure


# --- labels in place of legends -----------------------------------------------------------------

LINE = 0.17  # inches that a line of small text takes


def _name_lines(axes: Axes, ends: list, baselines: Mapping[str, float] | None, label: str) -> None:
    """Name each line, (height of its end, text, colour), at its right end, and draw the baselines, dashed."""
    baselines = {name: 100 * share for name, share in (baselines or {}).items()}
    for name, height in baselines.items():
        axes.axhline(height, color=GREY, linewidth=1, linestyle=(0, (6, 3)), label=name, zorder=1)
    ends = [*ends, *((height, f"{name}, pretrained\n{height:.2f}", GREY) for name, height in baselines.items())]
    low, high = axes.get_ylim()
    high = min(high, 100 + 0.02 * (100 - low))  # nothing is above 100 %
    axes.set(ylim=(low, high), ylabel=label)
    lines = max(text.count("\n") + 1 for _, text, _ in ends)
    gap = (high - low) * lines * LINE / (0.8 * axes.figure.get_figheight())  # the axes take four fifths of the height
    places = spread_out([height for height, _, _ in ends], gap, low + gap / 2, high - gap / 2)
    for (_, text, colour), y in zip(ends, places, strict=True):
        place = {"xy": (1, y), "xycoords": ("axes fraction", "data"), "xytext": (9, 0), "textcoords": "offset points"}
        axes.annotate(text, color=colour, va="center", fontsize=9, annotation_clip=False, **place)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to those given, by least squares, that keep their order, lie `gap` apart and in [low, high].

    Where there is no room for that they go beyond `high`.
    """
    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    placed = np.empty(len(places))
    least, greatest = low, max(low, high - steps[-1])
    placed[order] = isotonic_regression(np.asarray(places)[order] - steps, y_min=least, y_max=greatest) + steps
    return placed.tolist()


def _mark_value(axes: Axes, value: float, name: str, align: str = "center") -> None:
    """A vertical line at a value of the horizontal axis, its name above the axes, aligned to the line."""
    axes.axvline(value, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5, label=name)
    place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate(name, (value, 1), ha=align, va="bottom", fontsize=9, annotation_clip=False, parse_math=True, **place)
