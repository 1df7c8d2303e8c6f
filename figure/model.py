"""Draw the two stages of the method: figure/model.png, shown in the README.

python -m figure.model
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DATA, TRAINED, FROZEN, RESULT = "#f2f2f2", "#fdd9a0", "#cfe3f5", "#d5ecd4"  # told apart without colour by their labels
INK = "#222222"


def box(axes, x: float, y: float, text: str, colour: str, width: float = 1.9, height: float = 0.86) -> None:
    """A labelled box centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=INK))
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=INK, linespacing=1.35)


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from `start` to `end`."""
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": INK}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def draw() -> Figure:
    """The picture."""
    figure = Figure(figsize=(12.4, 5.1))
    axes = figure.subplots()
    axes.set_xlim(0, 14.2)
    axes.set_ylim(0, 5.9)
    axes.axis("off")

    axes.text(0.1, 5.6, "Stage 1: train on IND images", fontsize=12.5, weight="bold", color=INK)
    box(axes, 1.1, 3.9, "IND images\nand classes", DATA)
    box(axes, 4.0, 4.75, "Classifier\nextractor + head", TRAINED, 2.2)
    box(axes, 4.0, 3.05, "Conditional VAE\nencoder, decoder,\nclass embedding", TRAINED, 2.2, 1.15)
    arrow(axes, (2.07, 4.1), (2.88, 4.6))
    arrow(axes, (2.07, 3.7), (2.88, 3.2))
    axes.plot([5.55, 5.55], [0.25, 5.75], color="#999999", linewidth=1, linestyle=(0, (4, 3)))

    axes.text(5.8, 5.6, "Stage 2: fine-tune the head alone", fontsize=12.5, weight="bold", color=INK)
    box(axes, 6.85, 4.75, "IND images", DATA)
    box(axes, 6.85, 2.65, "embeddings of\ntwo classes $e_i$, $e_j$", DATA, 2.0)
    box(axes, 6.85, 1.0, "noise\n$z \\sim N(0, \\sigma^2 I)$", DATA, 2.0)
    box(axes, 9.15, 2.65, "class mixing: a coin\nfor each dimension", RESULT, 2.1)
    box(axes, 9.15, 1.0, "CVAE decoder\n(frozen)", FROZEN, 2.1)
    box(axes, 11.2, 2.0, "pseudo-OOD\nimages", RESULT, 1.5)
    box(axes, 10.6, 4.75, "extractor\n(frozen)", FROZEN, 1.6)
    box(axes, 13.1, 4.75, "head\n(fine-tuned)", TRAINED, 1.6)
    box(axes, 13.1, 2.65, "OOD score\nsoftmax or energy", RESULT, 2.0)
    arrow(axes, (7.82, 4.75), (9.78, 4.75))
    arrow(axes, (7.87, 2.65), (8.08, 2.65))
    arrow(axes, (7.87, 1.0), (8.08, 1.0))
    arrow(axes, (9.15, 2.2), (9.15, 1.45))
    arrow(axes, (10.22, 1.0), (11.0, 1.55))
    arrow(axes, (11.2, 2.45), (10.75, 4.3))
    arrow(axes, (11.42, 4.75), (12.28, 4.75))
    arrow(axes, (13.1, 4.3), (13.1, 3.1))
    return figure


def main() -> None:
    path = Path(__file__).with_suffix(".png")
    draw().savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.08)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
