"""Figures show what they were given: lines, counts, marked points and labels, read back from the drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.metrics import auc as area
from sklearn.metrics import roc_auc_score

from cli.errors import UserError
from cmg.scores import SCORES
from evaluation import figure_style, plots
from tests import children


def lines_of(figure) -> dict[str, np.ndarray]:
    """Label -> points [N, 2] of every line."""
    return {line.get_label(): np.array(line.get_xydata()) for line in figure.axes[0].lines}


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


# --- images -------------------------------------------------------------------------------------


def test_a_tile_is_each_pixel_enlarged_with_white_between_the_images():
    images = torch.arange(13 * 4, dtype=torch.uint8).reshape(13, 1, 2, 2)
    picture = plots.tile(images)
    step = 96 + 4
    assert picture.shape == (2 * step - 4, 12 * step - 4, 3) and picture.dtype == np.uint8
    for n, image in enumerate(images[:, 0].numpy()):
        top, left = n // 12 * step, n % 12 * step
        expected = np.repeat(np.repeat(image, 48, 0), 48, 1)[..., None]
        assert (picture[top : top + 96, left : left + 96] == expected).all()
    assert (picture[96:100] == 255).all() and (picture[:, 96:100] == 255).all() and (picture[100:, 100:] == 255).all()


def test_a_tile_takes_floats_and_colour_and_large_images():
    colour = torch.tensor([0.0, 0.5, 1.5]).reshape(1, 3, 1, 1).expand(2, 3, 100, 100)
    picture = plots.tile(colour)
    assert picture.shape == (100, 204, 3)
    assert picture[0, 0].tolist() == [0, 128, 255] and picture[50, 102].tolist() == [255] * 3


def test_the_grid_is_in_the_file_pixel_by_pixel(tmp_path):
    kinds = {
        "IND test": torch.randint(256, (14, 1, 8, 8), dtype=torch.uint8),
        "pseudo-OOD": torch.rand(3, 3, 28, 28),
    }
    figure = plots.sample_grid(kinds)
    figure_style.save_figure(figure, tmp_path / "new" / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png").convert("RGB"))
    first, second = (plots.tile(images) for images in kinds.values())
    assert picture.shape == (2 * 56 + 196 + 84 + 8, 2 * 8 + 1196, 3)
    assert (picture[56 : 56 + 196, 8 : 8 + 1196] == first).all()
    assert (picture[308 : 308 + 84, 8 : 8 + 260] == second).all()
    assert [text.get_text() for text in figure.texts] == [*kinds]
    assert (picture[:56] < 100).any() and (picture[252:308] < 100).any()  # the labels


# --- files --------------------------------------------------------------------------------------


def test_a_figure_gives_the_same_file_every_time_whatever_the_users_settings():
    import matplotlib

    def draw() -> bytes:
        return figure_style.figure_bytes(plots.roc_curves({"MSP": ([0.0, 1.0], [0.5, 2.0])}))

    plain = draw()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert draw() == plain and matplotlib.rcParams["font.size"] == 30
    assert b"<svg" in plain[:1000] and b"<image" not in plain
    assert figure_style.figure_bytes(plots.sweep({"CMG-energy": {1: [0.9]}}, "σ"), "png").startswith(b"\x89PNG\r\n")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    figure = plots.sweep({"CMG-energy": {1: [0.9]}}, "σ")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write .*file/a.png: "):
        figure_style.save_figure(figure, tmp_path / "file" / "a.png")
    (tmp_path / "old.png").write_bytes(b"old")

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        figure_style.save_figure(figure, tmp_path / "old.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_matplotlib_is_imported_only_to_draw(tmp_path):
    processes = [
        children.start(children.import_without_matplotlib, name, output=tmp_path / name)
        for name in ("cmg.evaluate", "evaluation.plots")
    ]
    assert children.finish(processes) == [0, 1], (tmp_path / "cmg.evaluate").read_text()
    assert "No module named 'matplotlib" in (tmp_path / "evaluation.plots").read_text()


# --- scores -------------------------------------------------------------------------------------


def stairs_of(figure) -> list[np.ndarray]:
    """The heights of the outlines."""
    return [patch.get_data().values for patch in figure.axes[0].patches if not patch.get_fill()]


def test_histograms_hold_every_score_once_and_name_the_auroc():
    draw = torch.Generator().manual_seed(0)
    ind, pseudo, ood = (torch.randn(n, generator=draw) * 2 + shift for n, shift in ((400, -9), (200, -4), (100, -3)))
    ind[0] = -1e6  # far beyond the axis
    figure = plots.score_histograms(
        "CMG-energy", {"IND test": ind, "pseudo-OOD": pseudo, "SVHN": ood}, "energy-ind", (-8.5, -3.5)
    )
    shares = stairs_of(figure)
    assert [share.sum() for share in shares] == pytest.approx([100, 100, 100]) and len(shares[0]) == 40
    assert legend_of(figure) == [
        "IND test\nn = 400",
        f"pseudo-OOD\nn = 200\nAUROC {100 * auroc_of(ind, pseudo):.2f} %",
        f"SVHN\nn = 100\nAUROC {100 * auroc_of(ind, ood):.2f} %",
    ]
    edges = figure.axes[0].patches[0].get_data().edges
    low, high = (np.quantile(part, q) for part, q in ((ind, 0.002), (ood, 0.998)))
    assert edges[0] == pytest.approx(low) and edges[-1] >= high
    inside = ind.double().numpy().clip(edges[0], edges[-1])
    for share, left, right in list(zip(shares[0], edges[:-1], edges[1:], strict=True))[:-1]:
        assert share == pytest.approx(100 * ((inside >= left) & (inside < right)).mean())
    assert lines_of(figure)[r"$m_\mathrm{in}$"][:, 0].tolist() == [-8.5, -8.5]
    assert lines_of(figure)[r"$m_\mathrm{out}$"][:, 0].tolist() == [-3.5, -3.5]
    assert figure.axes[0].get_xlabel() == "CMG-energy score: −logsumexp of the IND logits\nlarger: more likely OOD"
    note = figure.get_supxlabel()
    assert "They are energies: −logsumexp of all logits." in note and "hold what lies beyond" in note


@pytest.mark.parametrize(
    ("loss", "score", "xlabel", "remark"),
    [
        ("all", "energy-ind", "the IND logits", " They are energies: −logsumexp of all logits."),
        ("ind", "energy-all", "all logits", " They are energies: −logsumexp of the IND logits."),
        ("ind", "energy-ind", "the IND logits", ""),
        ("all", "energy-all", "all logits", ""),
    ],
)
def test_that_margins_and_score_differ_is_said_where_they_do(loss, score, xlabel, remark):
    figure = plots.score_histograms("CMG-energy", {"IND": [-9.0, -8.0], "OOD": [-3.0]}, score, (-8.5, -3.5), loss)
    assert figure.axes[0].get_xlabel() == f"CMG-energy score: −logsumexp of {xlabel}\nlarger: more likely OOD"
    assert figure.get_supxlabel().splitlines()[0] == plots.MARGINS_NOTE + remark


def test_margins_are_drawn_on_a_scale_of_energies_only():
    scores = {"IND": [0.2, 0.5], "OOD": [0.5, 0.9]}
    figure = plots.score_histograms("CMG-energy", scores, "ood-slot", (-8.5, -3.5))
    plain = plots.score_histograms("CMG-energy", scores, "ood-slot")
    assert lines_of(figure) == {} and figure.get_supxlabel() == plain.get_supxlabel()
    assert figure.axes[0].get_xlim() == plain.axes[0].get_xlim()


def test_every_score_has_its_words_and_a_new_one_its_name():
    assert set(plots.SCORE_NAMES) <= set(SCORES)
    figure = plots.score_histograms("CMG-energy", {"IND": [1.0, 2.0], "OOD": [3.0]}, "my-score")
    assert figure.axes[0].get_xlabel() == "CMG-energy score: my-score\nlarger: more likely OOD"


def auroc_of(ind, ood) -> float:
    return roc_auc_score([0] * len(ind) + [1] * len(ood), [*map(float, ind), *map(float, ood)])


def test_histograms_reach_to_the_margins_and_beyond_nothing():
    figure = plots.score_histograms("energy", {"IND": [0.5, 1.5], "OOD": [2.0, 3.0]}, "energy-all", (7.0, -5.0))
    assert figure.axes[0].get_xlim() == (-5, 7) and "beyond" not in figure.get_supxlabel()
    figure = plots.score_histograms("energy", {"IND": [3.0, 3.0], "OOD": [3.0]}, "energy-all")
    assert figure.axes[0].get_xlim() == (2.5, 3.5) and figure.get_supxlabel() == ""
    assert [share.sum() for share in stairs_of(figure)] == [100, 100]


def test_probabilities_are_drawn_as_log_odds():
    figure = plots.score_histograms("CMG-softmax", {"IND": [0.0, 0.25, 0.5], "OOD": [0.5, 0.75, 1.0]}, "ood-slot")
    xlabel = figure.axes[0].get_xlabel().splitlines()[0]
    assert xlabel == "CMG-softmax score: probability of the OOD slot, as log-odds"
    assert figure.axes[0].get_xlim()[0] == pytest.approx(np.log(1e-16), rel=0.01)
    assert legend_of(figure)[1] == f"OOD\nn = 3\nAUROC {100 * 8.5 / 9:.2f} %"
    odds = plots.log_odds(np.array([0.0, 0.2, 0.5, 0.8, 1.0]))
    assert odds == pytest.approx([-16 * np.log(10), -np.log(4), 0, np.log(4), np.log(2.0**53)], rel=1e-9, abs=1e-12)


def test_names_are_drawn_as_they_are_and_a_fourth_kind_is_refused():
    figure = plots.score_histograms("MSP", {"IND": [0.0, 2.0], r"$\bad$ folder": [1.0]}, "msp-ind")
    assert figure_style.figure_bytes(figure).startswith(b"<?xml")
    with pytest.raises(ValueError, match="zip"):
        plots.score_histograms("MSP", dict.fromkeys("abcd", [0.0, 1.0]), "msp-ind")


@pytest.mark.parametrize(("values", "fault"), [([], "none"), ([1.0, float("nan")], "not all finite")])
def test_scores_that_cannot_be_drawn_are_refused(values, fault):
    with pytest.raises(ValueError, match=f"the scores of OOD are {fault}"):
        plots.score_histograms("energy", {"IND": [1.0], "OOD": values}, "energy-all")
    with pytest.raises(ValueError, match=f"the scores of MSP are {fault}"):
        plots.roc_curves({"MSP": ([1.0], values)})


def test_roc_curves_by_hand():
    # thresholds 3, 2, 1: true positives 1/2, 1, 1; false positives 0, 1/2, 1
    figure = plots.roc_curves({"MSP": ([1.0, 2.0], [2.0, 3.0]), "CMG-energy": ([0.0, 1.0], [2.0, 3.0])}, "SVHN")
    lines = lines_of(figure)
    assert lines["MSP\nAUROC 87.50 %"].tolist() == [[0, 0], [0, 50], [50, 100], [100, 100]]
    assert lines["CMG-energy\nAUROC 100.00 %"].tolist()[-2:] == [[0, 100], [100, 100]]
    assert legend_of(figure) == ["CMG-energy\nAUROC 100.00 %", "MSP\nAUROC 87.50 %"]  # the best first
    assert figure.axes[0].get_ylabel() == "SVHN images detected, %"


def test_roc_curves_agree_with_the_metric_and_ties_are_slopes():
    draw = torch.Generator().manual_seed(1)
    ind, ood = torch.randint(9, (50,), generator=draw), torch.randint(3, 12, (40,), generator=draw)
    lines = lines_of(plots.roc_curves({"energy": (ind, ood)}))
    points = lines[f"energy\nAUROC {100 * auroc_of(ind, ood):.2f} %"]
    assert area(*points.T) / 1e4 == pytest.approx(auroc_of(ind, ood), abs=1e-6)


def test_a_crowd_of_detectors_is_grey_and_its_best_is_named():
    ind = [0.0, 1.0, 2.0, 3.0]
    shifts = {"CMG-energy": 2, "CMG-softmax": 0, "a": 1, "b": 4, "c": 0.5, "d": -1, "e": 1.5}
    figure = plots.roc_curves({name: (ind, [x + shift for x in ind]) for name, shift in shifts.items()})
    aurocs = {name: 100 * auroc_of(ind, [x + shift for x in ind]) for name, shift in shifts.items()}
    assert legend_of(figure) == [
        f"CMG-energy\nAUROC {aurocs['CMG-energy']:.2f} %",
        f"CMG-softmax\nAUROC {aurocs['CMG-softmax']:.2f} %",
        "b, best of 5 others\nAUROC 100.00 %",
        f"the remaining 4\nAUROC {aurocs['d']:.2f} to {aurocs['e']:.2f} %",
    ]
    colours = [to_hex(line.get_color()) for line in figure.axes[0].lines[1:]]
    assert colours == ["#0072b2", "#d55e00", figure_style.INK, *[plots.LIGHT] * 4]


# --- AUROC over steps and options ---------------------------------------------------------------


def run_of(mode: str, seed: int, aurocs: list[float], validated_step: int | None = None) -> dict:
    """A run as eval's result files hold it, checked every ten steps."""
    curve = [{"step": 10 * i, "auroc": {"SVHN": value, "LSUN": 0.1}} for i, value in enumerate(aurocs)]
    return {"mode": mode, "seed": seed, "margins": None, "validated_step": validated_step, "curve": curve}


def test_curves_over_steps_and_their_points():
    runs = [
        run_of("CMG-energy", 1, [0.90, 0.96, 0.84], validated_step=10),
        run_of("CMG-energy", 2, [0.88, 0.92, 0.80], validated_step=20),
        run_of("CMG-softmax", 1, [0.70, 0.60, 0.65]),
    ]
    figure = plots.auroc_over_steps(runs, "SVHN", {"MSP": 0.85})
    lines = {label: points.round(6).tolist() for label, points in lines_of(figure).items()}
    assert lines["CMG-energy"] == [[0, 89], [10, 94], [20, 82]]
    assert lines["CMG-energy, seed 2"] == [[0, 88], [10, 92], [20, 80]]
    points = {label: line for label, line in lines.items() if ": " in label}
    assert points == {
        "CMG-energy, seed 1: max": [[10, 96]],
        "CMG-energy, seed 1: last": [[20, 84]],
        "CMG-energy, seed 1: validated": [[10, 96]],
        "CMG-energy, seed 2: max": [[10, 92]],
        "CMG-energy, seed 2: last": [[20, 80]],
        "CMG-energy, seed 2: validated": [[20, 80]],
        "CMG-softmax, seed 1: max": [[0, 70]],
        "CMG-softmax, seed 1: last": [[20, 65]],
    }
    assert [y for _, y in lines["MSP"]] == [85, 85]
    assert texts_of(figure) == ["CMG-energy\nlast 82.00 ± 2.83", "CMG-softmax\nlast 65.00", "MSP, pretrained\n85.00"]
    assert legend_of(figure) == ["max (selected on test images)", "validated (selected without them)", "last"]
    assert figure.axes[0].get_ylabel() == "AUROC on SVHN, %" and figure.axes[0].get_ylim()[1] < 100


def test_marks_that_do_not_occur_are_not_explained_and_no_axis_passes_100():
    figure = plots.auroc_over_steps([run_of("CMG-energy", 1, [0.5, 1.0])], "SVHN")
    assert legend_of(figure) == ["max (selected on test images)", "last"]
    assert 100 <= figure.axes[0].get_ylim()[1] < 102


def test_a_sweep_shows_mean_and_deviation_and_the_methods_own_value():
    modes = {
        "CMG-energy": {3: [0.80, 0.84], 0.5: [0.92, 0.96], 10: [0.7]},
        "CMG-softmax": {3: [0.75], 0.5: [0.9], 10: [0.6]},
    }
    figure = plots.sweep(modes, "σ of the latents", own=3, baselines={"energy": 0.93})
    axes, lines = figure.axes[0], lines_of(figure)
    bars = {bar.get_label(): bar for bar in axes.containers}
    data = np.array(bars["CMG-energy"].lines[0].get_xydata())
    assert data.round(6).tolist() == [[0.5, 94], [3, 82], [10, 70]]
    ends = [segment[:, 1].round(6).tolist() for segment in bars["CMG-energy"].lines[2][0].get_segments()]
    sd = 100 * 0.02 * 2**0.5
    assert ends == [[round(94 - sd, 6), round(94 + sd, 6)], [round(82 - sd, 6), round(82 + sd, 6)], [70, 70]]
    assert lines["the method"][:, 0].tolist() == [3, 3] and lines["energy"][:, 1].tolist() == [93, 93]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "σ of the latents")  # tenfold and more
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "3", "10"]
    assert texts_of(figure) == ["the method", "CMG-energy", "CMG-softmax", "energy, pretrained\n93.00"]
    assert plots.sweep({"CMG-energy": {0: [0.9], 0.5: [0.8]}}, "p").axes[0].get_xscale() == "linear"


def test_known_modes_keep_their_look_and_no_two_look_alike():
    styles = figure_style.line_styles(["a", "CMG-softmax", "b", "c", "CMG-energy", "d", "e", "f"])
    assert len(styles) == plots.CROWDED + 2  # also where none of the most that are drawn is a mode of the method
    assert styles["CMG-softmax"] == figure_style.line_styles(["CMG-softmax"])["CMG-softmax"]
    for property in ("color", "linestyle", "marker"):
        assert len({style[property] for style in styles.values()}) == 8


def test_names_are_spread_without_crossing():
    assert plots.spread_out([1.0, 5.0, 3.0], 1, 0, 10) == [1, 5, 3]
    assert plots.spread_out([5.0, 5.0], 2, 0, 10) == [4, 6]
    assert plots.spread_out([10.0, 9.9, 9.8], 1, 0, 10) == [10, 9, 8]
    assert plots.spread_out([0.0, 0.0], 1, 0, 10) == [0, 1]
    assert plots.spread_out([3.0, 1.0, 2.0], 1, 0, 1) == [2, 0, 1]  # no room: beyond the upper end


def test_labels_do_not_overlap_in_the_drawing():
    runs = [run_of(mode, 1, [0.9, 0.95]) for mode in ("CMG-energy", "CMG-softmax")]
    figure = plots.auroc_over_steps(runs, "SVHN", {"MSP": 0.951, "energy": 0.949, "odin": 0.5})
    plots.styled(figure.draw_without_rendering)()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 5 and all(a.y1 <= b.y0 for a, b in zip(boxes[:-1], boxes[1:], strict=True))
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
