"""Figures for HTML pages that need no other file."""

from __future__ import annotations

import base64
import html
import io
from typing import Any


def pyplot() -> Any:
    """Return matplotlib's pyplot without a display, with the style of the pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25,
         "figure.facecolor": "white", "savefig.facecolor": "white"}
    )  # fmt: skip
    return plt


def as_png(figure: Any, dpi: int = 110) -> bytes:
    """Return a figure as a PNG, and close it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    pyplot().close(figure)
    return stream.getvalue()


def html_image(png: bytes, alt: str) -> str:
    """Return an HTML image with the PNG inside."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
