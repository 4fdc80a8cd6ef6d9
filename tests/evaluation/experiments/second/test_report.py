"""Tables, plots and the report of the second experiment, from made-up answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.experiments.bootstrap import BootstrapMetrics
from evaluation.experiments.second import plots, tables
from evaluation.experiments.second.comparisons import PRIMARY, TESTED
from evaluation.experiments.second.plan import LEVELS, SecondPlan, piece_digest, pieces_of
from evaluation.experiments.second.report import write_report
from evaluation.experiments.second.store import save_piece
from evaluation.statistics.paired import holm
from tests.evaluation.experiments.second.answers import made_up

PLAN = SecondPlan(sizes=(20, 40), draws=4, resamples=200, seeds=1)
SIGNALS = {"y-aware": 1.5, "simclr": 0.6, "age-regression": 0.7, "random": 0.1, "voxels-brain-age": 0.5}


def answers_of(level="middle", methods=tuple(SIGNALS), **more):
    """Answers of some methods to both diseases: spatial features with readouts, or those of methods without an encoder."""
    return [
        made_up(name, "main" if name.startswith("voxels") else "readout", SIGNALS[name], level=level, task=task,
                sizes=PLAN.sizes, **more)
        for name in methods for task in ("scz", "ad")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def metrics():
    return BootstrapMetrics([entry for level in LEVELS for entry in answers_of(level)], PLAN.resamples, 0)


def test_holms_correction_is_over_all_rows_named_beforehand(metrics):
    table = tables.primary_table(metrics, PLAN)
    assert len(table) == len(PRIMARY) * 2 * len(PLAN.sizes)
    assert list(table["minus"][: len(PRIMARY)]) == [method.title for method in PRIMARY]
    np.testing.assert_allclose(table["p_holm"], holm(table["p"].to_numpy(float)))
    # A comparison that is not measured yet is shown without numbers, and still counts in the correction of the others.
    some = BootstrapMetrics(answers_of(methods=("y-aware", "random")), PLAN.resamples, 0)
    part = tables.primary_table(some, PLAN)
    assert len(part) == len(table)
    measured = part["difference"].notna()
    assert set(part["minus"][measured]) == {"random encoder, spatial + readout"}
    padded = part["p"].fillna(1.0).to_numpy(float)
    np.testing.assert_allclose(part["p_holm"][measured], holm(padded)[measured.to_numpy()])
    assert part["p_holm"][~measured].isna().all()
    assert (part["p_holm"][measured] >= len(part) * part["p"].min() - 1e-12).all()


def test_hopes_are_judged_by_sign_and_corrected_p():
    rows = [
        (other.title, difference, p)
        for other in PRIMARY
        for difference, p in ((0.1, 0.01), (0.1, 0.2), (0.05, 0.03), (-0.1, 0.001))
    ]
    primary = pd.DataFrame(rows, columns=["minus", "difference", "p_holm"])
    found = tables.hopes_table(primary).set_index("y-aware, spatial + readout, minus")
    voxels = found.loc["voxels + brain-age score"]
    assert (voxels["above (hoped for)"], voxels["found (hoped for)"], voxels["fulfilled"]) == ("3 (3)", "2 (2)", "yes")
    assert found.loc["SimCLR, spatial + readout", "fulfilled"] == "no"  # above in three of four
    assert set(tables.hopes_table(primary, complete=False)["fulfilled"]) == {""}
    primary.loc[0, "difference"] = np.nan
    assert tables.hopes_table(primary)["fulfilled"][0] == ""


def test_levels_are_compared_with_their_own_answers(metrics):
    table = tables.levels_table(metrics, PLAN)
    assert list(dict.fromkeys(table["level"])) == list(LEVELS)
    assert len(table) == 3 * len(tables.primary_table(metrics, PLAN))
    shifted = [replace(entry, answers=-entry.answers) for entry in answers_of("hard")]
    other = tables.levels_table(BootstrapMetrics([*answers_of("middle"), *shifted], 50, 0), PLAN)
    signs = other.groupby("level")["difference"].mean()
    assert signs["middle"] > 0 > signs["hard"]


def test_cells_of_wide_tables_have_interval_and_corrected_p(metrics):
    primary = tables.primary_table(metrics, PLAN)
    wide = tables.wide(primary, ["minus"], "difference")
    assert list(wide.columns) == ["minus", "schizophrenia, 20", "schizophrenia, 40", "Alzheimer's disease, 20",
                                  "Alzheimer's disease, 40"]  # fmt: skip
    row = primary.iloc[0]
    expected = f"{row['difference']:.3f} [{row['low']:.3f}, {row['high']:.3f}] p {row['p_holm']:.4f}"
    assert wide.iloc[0, 1] == expected


def test_plots_draw_the_values_of_their_tables(metrics):
    auc = tables.auc_table(metrics, PLAN)
    middle = auc[auc["level"] == "middle"]
    figure = plots.plot_middle(auc)
    drawn = [[float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"] for axis in figure.axes]
    expected = [list(panel["auc"]) for _, panel in middle.groupby(["task", "n_train"], sort=False)]
    assert drawn == expected
    curves = plots.plot_levels(auc)
    names = [text.get_text() for text in curves.legends[0].get_texts()]
    assert names[0] == TESTED.title
    assert "voxels + brain-age score" in names
    first = curves.axes[0].containers[0].lines[0]
    of_method = auc[(auc["method"] == TESTED.title) & (auc["task"] == "schizophrenia") & (auc["n_train"] == 20)]
    np.testing.assert_allclose(first.get_ydata(orig=False), of_method.set_index("level").loc[list(LEVELS), "auc"])
    levels = tables.levels_table(metrics, PLAN)
    differences = plots.plot_differences(levels)
    values = [
        float(line.get_xdata()[0])
        for line in differences.axes[0].lines
        if line.get_marker() == "o" and len(line.get_xdata())
    ]
    panel = levels[(levels["task"] == "schizophrenia") & (levels["n_train"] == 20)]
    assert sorted(values) == pytest.approx(sorted(panel["difference"]))


def test_the_report_uses_done_pieces_only_and_names_the_others(tmp_path):
    results, out = tmp_path / "answers", tmp_path / "out"
    out.mkdir()
    by_name = {piece.name: piece for piece in pieces_of(PLAN)}
    for name, plan in (("y-aware-0", PLAN), ("simclr-0", PLAN), ("random-0", replace(PLAN, steps=3))):
        piece = by_name[f"middle/{name}"]
        save_piece(piece.file(results), piece_digest(plan, piece), answers_of(methods=(piece.method,)))
    write_report(out, results, PLAN)
    text = (out / "results.md").read_text()
    assert f"2 of {len(by_name)} pieces are done" in text
    assert "middle/random-0" in text.split("Not yet: ")[1].split("\n")[0]  # stored for another plan
    assert "| y-aware, spatial + readout |" in text
    assert set(pd.read_csv(out / "auc.csv")["method"]) == {TESTED.title, "SimCLR, spatial + readout"}
    for name in ("middle", "levels", "differences"):
        assert (out / f"experiment2_{name}.png").read_bytes().startswith(b"\x89PNG")
