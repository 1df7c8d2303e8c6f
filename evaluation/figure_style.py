"""How figures look, and how they become files. Nothing is drawn on a screen, no state of pyplot's is touched."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cli.files import replacing

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its caches is no matter of the user's

WIDTH = 6.4  # inches, at 110 to 130 pixels each where a page shows the picture
PIXELS = 200  # an inch of a PNG file
INK, GREY, LIGHT = "#222222", "#767676", "#b4b4b4"
STYLE = {
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.dpi": 100,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "text.parse_math": False,  # names of data sets are drawn as they are
    "svg.fonttype": "path",  # text looks the same wherever the picture is shown
    "svg.hashsalt": "figure",  # the same data make the same file
}

# The palette of Okabe and Ito (Color Universal Design, 2008). Colour never tells things apart alone.
KNOWN_LINES = {
    "CMG-energy": {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    "CMG-softmax": {"color": "#d55e00", "linestyle": "--", "marker": "s"},
}
OTHER_LINES = (
    {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    {"color": "#cc79a7", "linestyle": ":", "marker": "D"},
    {"color": "#56b4e9", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#e69f00", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#000000", "linestyle": (0, (6, 2)), "marker": "X"},
    {"color": "#f0e442", "linestyle": (0, (3, 1, 1, 1)), "marker": "*"},
)
KINDS = (  # of images, in the order of `score_histograms`
    {"color": "#009e73", "linestyle": "-"},
    {"color": "#e69f00", "linestyle": "--"},
    {"color": "#cc79a7", "linestyle": "-."},
)
OURS = "CMG"  # what the names of the method's own detectors begin with


def line_styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour, line and marker of each name: always the same for the method's modes, the others in turn."""
    others = cycle(OTHER_LINES)
    return {name: KNOWN_LINES.get(name) or next(others) for name in names}


def styled(function: Callable) -> Callable:
    """`function` under `STYLE`, whatever the user's own settings are."""

    @wraps(function)
    def under_style(*args, **kwargs):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return function(*args, **kwargs)

    return under_style


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the given size in inches with one pair of axes."""
    figure = Figure((WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


# --- files --------------------------------------------------------------------------------------


@styled
def figure_bytes(figure: Figure, kind: str = "svg") -> bytes:
    """The figure as a file in memory: "svg", or "png" at 200 pixels an inch. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=PIXELS, metadata={"svg": {"Date": None}}.get(kind))
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, whole or not at all. Raises `UserError` when it cannot be written."""
    content = figure_bytes(figure, "png")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
