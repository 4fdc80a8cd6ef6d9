"""The reliability of candidates as an HTML page that needs no network, with CSV, LaTeX and a picture beside it."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.comparison.formats import csv_files, number, write_files
from evaluation.comparison.latex import latex_table
from evaluation.comparison.plots import MARKERS, PALETTE, REFERENCE, new_figure, style, to_png, to_svg
from evaluation.comparison.sections import html_table
from evaluation.retest.rates import Estimate
from infra.errors import UserError
from infra.page import STYLE

COMPARED = {"scanners": "between scanners", "repeats": "repeats on one scanner"}
SIMULATED = (
    '<p class="simulated"><strong>Simulated data.</strong> These scans come from a simulator, not from people. They say '
    "nothing about real scanners.</p>"
)
NOTES = {
    "icc": "Median over features and, in brackets, their quartiles. ICC(2,1), agreement: constant offsets of scanners count as "
    "error. ICC(3,1), consistency: they do not. Of a prediction: value and 95 % interval over people.",
    "rates": "Identified: the share of scans whose nearest scan from another scanner is of the same person (if scanners "
    "are not compared: whose nearest other scan is). Scanner recognised: balanced accuracy of a linear classifier, tested on "
    "other people; at chance they are not told apart. "
    "95 % intervals over people.",
    "retest": "How much a prediction changes between scans of one person. SD: within-person standard deviation. Difference: "
    "mean absolute difference of two scans. 95 % intervals over people.",
    "shares": "Shares of person, scanner, session and rest in the variance, by a mixed model (REML): of "
    "the first principal components together, and of each prediction. A dash: "
    "it cannot be told apart; of a session it can if at least five people have several, and some session has several scans.",
}


@dataclass(frozen=True)
class Content:
    """What the page shows: the tables of ``Reliability``, whether scans are simulated, and lines about people and scans."""

    tables: dict[str, pd.DataFrame]
    simulated: bool
    about: list[str]


def summary_text(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary as texts with a row per candidate: what the terminal, the page and LaTeX show."""
    rows = []
    for row in summary.to_dict("records"):
        cells = {"checkpoint": _title(row)}
        for compared, words in COMPARED.items():
            for kind, name in (("icc21", "ICC(2,1)"), ("icc31", "ICC(3,1)")):
                if f"{compared}.{kind}" in summary:
                    cells[f"{name} {words}"] = _quartiles(row, f"{compared}.{kind}")
        for key, words in (("identification", "identified"), ("scanner", "scanner recognised")):
            if key in summary:
                cells[words] = _with_limits(_estimate(row, key))
                cells[f"chance of {words}"] = number(row.get(f"{key}.chance", np.nan))
        rows.append(cells)
    return pd.DataFrame(rows).fillna("-")


def write_page(content: Content, out: Path) -> list[Path]:
    """Write the page to ``out``, and every table (.csv), a LaTeX table (.tex) and the picture (.png) beside it.

    A table without rows is not written. Returns the paths, the page's first. Raises UserError if ``out`` does not end in .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the page {out} is a page of HTML; give a name that ends in .html")
    with style():
        figure = draw(content.tables)
        picture, vector = to_png(figure), to_svg(figure)
    files = {out: _page(content, vector).encode()}
    files |= csv_files(content.tables, out)
    text = summary_text(content.tables["summary"])
    caption = f"Reliability. {NOTES['icc']} {NOTES['rates']}".replace("%", "\\,\\%").replace(" \\,", "\\,")
    simulated = " Simulated data." if content.simulated else ""
    latex = latex_table(list(text.columns), [list(row) for row in text.to_numpy()], caption + simulated)
    files[out.with_name(f"{out.stem}.tex")] = ("% needs \\usepackage{booktabs}\n" + latex).encode()
    files[out.with_name(f"{out.stem}.png")] = picture
    write_files(files, [out.with_name(f"{out.stem}_{name}.csv") for name in content.tables])
    return list(files)


def draw(tables: dict[str, pd.DataFrame]) -> Any:
    """Draw the features' ICCs of each candidate (median, quartiles, 5 to 95 %), those of predictions, and both rates."""
    summary, icc = tables["summary"], tables["icc"]
    compared = [name for name in COMPARED if (icc["compared"] == name).any()]
    figure, axes = new_figure(1, len(compared) + 1, 1.5 + 0.62 * len(summary), sharey=True)
    axes = axes[0]
    for axis, name in zip(axes, compared, strict=False):
        _draw_icc(axis, icc[icc["compared"] == name], summary)
        axis.set_title(f"ICC {COMPARED[name]}")
    _draw_rates(axes[-1], summary)
    axes[0].set_yticks(range(len(summary)), [_title(row) for row in summary.to_dict("records")])
    axes[0].set_ylim(len(summary) - 0.4, -0.6)
    return figure


def _draw_icc(axis: Any, icc: pd.DataFrame, summary: pd.DataFrame) -> None:
    for position, row in enumerate(summary.to_dict("records")):
        own = icc[(icc["checkpoint"] == row["checkpoint"]) & (icc["step"] == row["step"])]
        for shift, kind, colour in ((-0.14, "icc21", PALETTE[0]), (0.14, "icc31", PALETTE[2])):
            values = own[own["kind"] == "feature"][kind].dropna().to_numpy(np.float64)
            words = {"icc21": "ICC(2,1), agreement", "icc31": "ICC(3,1), consistency"}[kind]
            label = f"{words} (features)" if position == 0 else None
            if len(values):
                outer, low, median, high, last = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
                axis.plot([outer, last], [position + shift] * 2, color=colour, linewidth=1)
                axis.plot(
                    [low, high], [position + shift] * 2, color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt"
                )
                axis.plot(median, position + shift, "o", color=colour, markersize=5, label=label)
            predictions = own[own["kind"] == "prediction"]
            for number_of, prediction in enumerate(predictions.to_dict("records")):
                name = f"{kind.upper()[:3]} of {prediction['name']}"
                axis.plot(
                    prediction[kind], position + shift, MARKERS[1 + number_of % 6], color=colour, markersize=6,
                    markerfacecolor="white", label=name if position == 0 and kind == "icc21" else None,
                )  # fmt: skip
    axis.set_xlim(min(0.0, axis.get_xlim()[0]), 1.02)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize=8, ncols=1)


def _draw_rates(axis: Any, summary: pd.DataFrame) -> None:
    for position, row in enumerate(summary.to_dict("records")):
        rates = ((-0.14, "identification", "person identified", 4), (0.14, "scanner", "scanner recognised", 1))
        for shift, key, words, colour in rates:
            if not np.isfinite(row.get(key, np.nan)):
                continue
            value, low, high = _estimate(row, key)
            axis.plot([low, high], [position + shift] * 2, color=PALETTE[colour], linewidth=2)
            label, chance = (words, "chance") if position == 0 else (None, None)
            marker = MARKERS[0] if key == "identification" else MARKERS[1]
            axis.plot(value, position + shift, marker, color=PALETTE[colour], label=label)
            axis.plot(row[f"{key}.chance"], position + shift, "|", color=REFERENCE, markersize=11, markeredgewidth=2,
                      label=chance if key == "scanner" or "scanner" not in summary else None)  # fmt: skip
    axis.set_xlim(-0.02, 1.02)
    axis.set_title("People and scanners")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize=8, ncols=1)


def _page(content: Content, picture: bytes) -> str:
    tables = content.tables
    summary = summary_text(tables["summary"])
    source = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    parts = [
        f"<h2>Summary</h2><p class='note'>{html.escape(NOTES['icc'])} {html.escape(NOTES['rates'])}</p>"
        f'<figure><img alt="Reliability" src="{source}"></figure>{_html(summary)}'
    ]
    predictions = tables["icc"][tables["icc"]["kind"] == "prediction"]
    if len(predictions):
        parts.append(f"<h2>Predictions</h2>{_html(_prediction_text(predictions))}")
    if len(tables["retest"]):
        text = _retest_text(tables["retest"])
        parts.append(f"<h2>Retest error</h2><p class='note'>{html.escape(NOTES['retest'])}</p>{_html(text)}")
    shares = _shares_text(tables)
    if len(shares):
        parts.append(f"<h2>Variance</h2><p class='note'>{html.escape(NOTES['shares'])}</p>{_html(shares)}")
    about = "".join(f"<p>{html.escape(line)}</p>" for line in content.about)
    head = f"<meta charset='utf-8'><title>Reliability</title><style>{STYLE} td.n, th.n {{ text-align: right; }}</style>"
    banner = SIMULATED if content.simulated else ""
    return (
        f"<!doctype html><html lang='en'><head>{head}</head><body><h1>Reliability</h1>{banner}{about}{''.join(parts)}"
        "</body></html>\n"
    )


def _html(table: pd.DataFrame) -> str:
    return html_table([str(name) for name in table.columns], [[str(cell) for cell in row] for row in table.to_numpy()])


def _prediction_text(icc: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {"checkpoint": _title(row), "prediction": row["name"], "compared": COMPARED[row["compared"]],
         "ICC(2,1)": _with_limits(Estimate(row["icc21"], row["icc21_low"], row["icc21_high"])),
         "ICC(3,1)": _with_limits(Estimate(row["icc31"], row["icc31_low"], row["icc31_high"]))}
        for row in icc.to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _retest_text(retest: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {"checkpoint": _title(row), "prediction": f"{row['name']} ({row['unit']})" if row["unit"] else row["name"],
         "compared": COMPARED[row["compared"]],
         "SD": _with_limits(Estimate(row["sd"], row["sd_low"], row["sd_high"])),
         "difference": _with_limits(Estimate(row["difference"], row["difference_low"], row["difference_high"]))}
        for row in retest.to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _shares_text(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    parts = ("person", "scanner", "session", "rest")
    rows = [
        {"checkpoint": _title(row), "of": "components together",
         **{part: number(row.get(f"share.{part}", np.nan)) for part in parts}}
        for row in tables["summary"].to_dict("records") if np.isfinite(row.get("share.rest", np.nan))
    ]  # fmt: skip
    shares = tables["shares"]
    for row in shares[shares["kind"] == "prediction"].to_dict("records"):
        rows.append({"checkpoint": _title(row), "of": row["name"], **{part: number(row[part]) for part in parts}})
    return pd.DataFrame(rows)


def _title(row: dict[Any, Any]) -> str:
    return f"{row['checkpoint']}, step {row['step']}" if row["step"] else str(row["checkpoint"])


def _estimate(row: dict[Any, Any], key: str) -> Estimate:
    return Estimate(*(float(row.get(f"{key}{end}", np.nan)) for end in ("", ".low", ".high")))


def _with_limits(estimate: Estimate) -> str:
    if not np.isfinite(estimate.value):
        return "-"
    return f"{estimate.value:.2f} [{number(estimate.low)}, {number(estimate.high)}]"


def _quartiles(row: dict[Any, Any], key: str) -> str:
    return _with_limits(Estimate(*(float(row.get(f"{key}{end}", np.nan)) for end in ("", ".q25", ".q75"))))
