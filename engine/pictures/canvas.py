"""A sheet to draw on, by matplotlib, which only pictures need and which is imported only for them.

Its object interface alone is used: no window, no backend to choose, no figure that outlives its
file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")


class PictureError(Error, ValueError):
    """A picture that cannot be drawn: what was wanted, what came, what to do."""


def check(path: str | os.PathLike[str]) -> Path:
    """`path`, if a picture can be written there; before the work, since work is lost otherwise.

    Raises PictureError for another format than .svg, .png and .pdf, for a folder that is not there
    and where matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"{path}: wanted a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise PictureError(f"{path}: there is no folder {path.parent}; make it first")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise PictureError(
            "pictures are drawn by matplotlib, which is not installed: pip install -e '.[plot]'"
        ) from None
    return path


@contextlib.contextmanager
def sheet(
    path: str | os.PathLike[str], width: float, height: float, *, pixels: float = 1
) -> Iterator[Axes]:
    """Axes of `width` by `height` points, origin bottom left, written to `path` at the end.

    pixels: of a PNG, to a point. Text in an SVG stays text, and the same drawing is the same file.
    """
    path = check(path)
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72 * pixels, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    yield axes
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix.lower())
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={dated: None} if dated else {})


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How many points `text` takes in a line of type of `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(weight="bold" if bold else "normal")
    return float(TextPath((0, 0), text, size=size, prop=font).get_extents().width)
