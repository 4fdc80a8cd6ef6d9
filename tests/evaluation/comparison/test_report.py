"""The HTML report, and the CSV tables, LaTeX tables and plots beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from evaluation.comparison import repeats, sections
from evaluation.comparison.latex import escape, to_latex
from evaluation.comparison.plots import calibration, forest, learning_curves, running_mean, steps, style
from evaluation.comparison.report import SECTIONS
from evaluation.tasks.published import PUBLISHED

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Y_AWARE = "y-aware, step 200, linear"


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    return comparison.report(tmp_path_factory.mktemp("out") / "report.html")


@pytest.fixture(scope="module")
def page(written):
    return written[0].read_text()


def test_the_page_has_every_section_that_applies(page):
    titles = dict(re.findall(r'<h2 id="(\w+)">([^<]+)</h2>', page))
    assert titles == {
        name: section.title for name, section in SECTIONS.items() if name not in ("umap", "chosen", "published")
    }  # none were stored; the scans are simulated
    assert re.findall(r'<a href="#(\w+)">', page) == list(titles)


def test_the_page_needs_no_network_and_runs_no_script(page):
    assert not re.search(r"(src|href)=['\"]?(https?:|//|/)", page)
    assert "<script" not in page


def test_every_section_with_a_plot_shows_it_and_has_a_file(page, written):
    with_plot = [name for name, section in SECTIONS.items() if section.plot and name != "umap"]
    assert [path.name for path in written if path.suffix == ".png"] == [f"report_{name}.png" for name in with_plot]
    shown = re.findall(
        r'<section><h2 id="(\w+)">(?:(?!</section>).)*?<img alt="[^"]+" src="data:image/(png|svg)', page, re.S
    )
    assert shown == [(name, "png" if SECTIONS[name].bitmap else "svg") for name in with_plot]


def test_text_from_the_store_is_escaped(page):
    assert "5 &amp; &lt;6&gt;" in page
    assert "5 & <6>" not in page


def test_simulated_scans_are_marked(comparison, page):
    assert "<strong>Simulated data.</strong>" in page
    assert to_latex(comparison).count("Simulated data.") == 5
    for evaluation in comparison.evaluations:
        evaluation.run["tags"]["yaware.simulated"] = "False"
    try:
        assert sections.banner(comparison) == ""
        assert "Simulated" not in to_latex(comparison)
    finally:
        for evaluation in comparison.evaluations:
            evaluation.run["tags"]["yaware.simulated"] = "True"


def cells_of(page, section, first):
    """The cells of the first row of a section's tables that begins with ``first``."""
    text = page[page.index(f'<h2 id="{section}">') :]
    text = text[: text.index("</section>")]
    for row in re.findall(r"<tr>(.*?)</tr>", text):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        if cells and cells[0] == first:
            return cells
    raise AssertionError(f"no row {first!r} in {section}")


def test_the_page_shows_the_values_of_the_tables(comparison, page):
    metrics = comparison.metrics.set_index(["checkpoint", "task", "metric"])
    row = metrics.loc[(Y_AWARE, "scz", "auc")]
    assert cells_of(page, "auc", Y_AWARE)[1] == f"{row.value:.3f} [{row.low:.2f}, {row.high:.2f}]"
    site = comparison.site_leakage.set_index("checkpoint").loc[Y_AWARE]
    assert cells_of(page, "site_age", Y_AWARE)[1:] == [
        "3", f"{site.bacc:.3f}", "0.333", f"{site.leakage:.3f}", "5.50", f"{site.openbhb:.2f}"
    ]  # fmt: skip
    assert cells_of(page, "subgroups", "site island")[3] == "fewer than 20 participants"


def test_the_unit_of_an_error_is_named_for_ages_only(comparison):
    assert comparison.label("age", "mae") == "MAE (years)"
    assert comparison.label("age", "r2") == "R²"
    renamed = []
    for evaluation in comparison.evaluations:
        table = evaluation.predictions.replace({"task": {"age": "language"}})
        renamed.append(replace(evaluation, predictions=table.assign(label=table["label"] / 10)))
    metrics = comparison.metrics.replace({"age": "language"})
    other = replace(comparison, evaluations=renamed, last=renamed, metrics=metrics)
    assert other.label("language", "mae") == "MAE"
    assert "MAE ↓" in sections.metrics(other)
    assert "years" not in sections.metrics(other)
    for each, label in ((comparison, "MAE (years)"), (other, "MAE")):
        assert {axis.get_xlabel() for axis in forest(each).axes if "MAE" in axis.get_xlabel()} == {label}


def test_published_values_are_marked_as_not_measured_and_left_out_for_simulated_scans(comparison, page):
    real = tagged(comparison, simulated="False")
    assert sections.published_tasks(real) == ["scz"]
    section = f'<h2 id="published">{sections.published(real)}</section>'
    assert (
        cells_of(section, "published", "schizophrenia, 500 training scans")[1]
        == f"{PUBLISHED['scz'][500]['y-Aware']:.3f}"
    )
    assert "These values were not measured here." in section
    assert "class='reference'" in section
    assert comparison.simulated
    assert sections.published_tasks(comparison) == []
    assert "Published values" not in page


@pytest.mark.parametrize(
    ("tags", "icc"),
    [
        ({"layer": "layer3", "pooling": "mean"}, 0.3),
        ({"layer": "layer3", "pooling": "max"}, None),
        ({"layer": "layer2", "pooling": "mean"}, None),
        ({"layer": "auto"}, None),
        ({"layer": "own+spatial"}, 0.8),  # the own features are a part of these
        ({}, 0.8),
        ({"layer": "layer3", "pooling": "mean", "evaluates": "table"}, 0.8),  # a table has no blocks
    ],
)
def test_reliability_is_that_of_the_evaluated_features(store, tags, icc):
    known = {"run_name": "y-aware", "step": "200", "weights_sha256": "5" * 64} | tags
    evaluation = SimpleNamespace(name="x", run={"tags": {f"yaware.{name}": value for name, value in known.items()}})
    found = repeats.reliability_table(store, "kept", [evaluation])["icc21"].tolist()
    assert found == ([] if icc is None else [icc])


def test_reliability_is_shown_beside_accuracy_for_the_checkpoints_that_were_measured(comparison, page):
    table = comparison.reliability.set_index("checkpoint")
    assert set(table.index) == {each.name for each in comparison.evaluations if (each.step, each.run["tags"]["yaware.run_name"])
                                in ((200, "y-aware"), (200, "SimCLR"))}  # fmt: skip
    assert table.loc[Y_AWARE, "icc21"] == pytest.approx(0.8)  # the newest run
    assert table.loc[Y_AWARE, "compared"] == "scanners"
    assert table.loc[Y_AWARE, "age_sd_high"] == pytest.approx(3.0)
    assert table.loc[Y_AWARE, "scanner_chance"] == pytest.approx(0.125)
    assert table.loc["SimCLR, linear", "icc21"] == pytest.approx(0.6)  # not that of other weights
    assert np.isnan(table.loc[Y_AWARE, "icc31_q25"])  # not logged
    assert cells_of(page, "reliability", Y_AWARE)[2] == "0.80 [0.70, 0.85]"
    assert cells_of(page, "reliability", Y_AWARE)[5] == "0.80 [0.70, 0.90; 0.05]"
    axes = repeats.draw(comparison).axes
    assert [axis.get_title() for axis in axes if axis.get_visible()] == [
        task.title for task in comparison.tasks.values()
    ]
    by_title = {axis.get_title(): axis for axis in axes}
    assert by_title["age"].yaxis_inverted()
    assert not by_title["schizophrenia"].yaxis_inverted()


def tagged(comparison, **tags):
    """The comparison with other tags of its evaluation runs."""
    every = {f"yaware.{name}": value for name, value in tags.items()}
    changed = {
        each.name: replace(each, run={**each.run, "tags": {**each.run["tags"], **every}}, earlier={})
        for each in comparison.evaluations
    }
    return replace(comparison, evaluations=[*changed.values()], last=[changed[each.name] for each in comparison.last])


def test_published_curves_are_drawn_for_real_scans_only(comparison):
    def texts(each):
        return [text.get_text() for axis in learning_curves(each).axes for text in axis.texts]

    assert texts(comparison) == []
    real = tagged(comparison, simulated="False")
    assert texts(real) == ["published: y-Aware", "published: SimCLR", "published: age supervision"]
    other = tagged(comparison, simulated="False", layer="own+spatial")
    assert texts(other)[0] == "published, another method: y-Aware"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, ""),
        (
            {"layer": "own+spatial", "readouts": "default", "beside": '{"scz": ["age"]}'},
            "none: spatial features, readouts, age",
        ),
        ({"layer": "layer2", "pooling": "mean,std", "leave_site_out": "True"}, "none: layer2 mean+std, sites left out"),
        ({"protocol": "knn", "model": "knn"}, "none: knn"),
        ({"evaluates": "table"}, "none: features of others"),
        ({"evaluates": "shards", "model": "linear", "scale": "all"}, "none: no pretrained encoder, one scale"),
        ({"beside": ""}, "none: unknown covariates"),
        ({"beside": "[1]"}, "none: unknown covariates"),
    ],
)
def test_published_values_name_the_results_of_the_same_method_or_say_what_differs(comparison, tags, expected):
    changed = tagged(comparison, simulated="False", **tags)
    section = f'<h2 id="published">{sections.published(changed)}</section>'
    cells = cells_of(section, "published", "schizophrenia, 500 training scans")
    if tags:
        assert cells[-1] == expected
    else:
        names = [each.name for each in changed.last if "scz" in each.tasks]
        assert len(names) > 2
        assert cells[-1] == ", ".join(names)


def lines_of(axis):
    """Label -> (x, y) of the lines of an axis that have a label."""
    handles, labels = axis.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    return {label: np.array(line.get_data(), float) for label, line in zip(labels, lines, strict=True)}


def test_plots_draw_the_values_of_the_tables(comparison):
    curves = comparison.curves.query("checkpoint == @Y_AWARE")
    (axis,) = [axis for axis in learning_curves(comparison).axes if axis.get_visible()]
    assert lines_of(axis)[Y_AWARE][1].tolist() == curves["auc"].tolist()
    assert set(lines_of(axis)) == {Y_AWARE, "SimCLR, linear"}  # the others have no learning curve
    bins = comparison.calibration.query("checkpoint == @Y_AWARE")
    assert lines_of(calibration(comparison).axes[0])[Y_AWARE].tolist() == [
        list(bins["predicted"]),
        list(bins["observed"]),
    ]
    metrics = comparison.metrics.set_index(["checkpoint", "task", "metric"])["value"]
    aucs = [metrics[f"y-aware, step {step}, linear", "scz", "auc"] for step in (100, 200)]
    assert lines_of(steps(comparison).axes[0])["y-aware, linear"].tolist() == [[100, 200], aucs]


def test_drawing_leaves_the_settings_of_matplotlib_alone(comparison, tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    with style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    comparison.report(tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_a_running_mean_is_over_fewer_values_at_the_ends():
    assert running_mean(np.array([1.0, 2.0, 3.0, 10.0]), 3) == pytest.approx([1.5, 2.0, 5.0, 6.5])


def test_every_table_is_a_csv_file_beside_the_page(comparison, written):
    paths = {path.name: path for path in written if path.suffix == ".csv"}
    assert set(paths) == {f"report_{name}.csv" for name in comparison.tables}
    assert all(len(table) for table in comparison.tables.values())
    for name, table in comparison.tables.items():
        stored = pd.read_csv(paths[f"report_{name}.csv"], keep_default_na=True)
        assert list(stored.columns) == list(table.columns)
        numbers = table.select_dtypes("number").columns
        np.testing.assert_array_equal(stored[numbers].to_numpy(float), table[numbers].to_numpy(float))


def test_a_table_without_rows_and_a_plot_without_data_are_no_files(comparison, tmp_path):
    """The same page is written again from a single evaluation without reliability, learning curve and several sites."""
    out = tmp_path / "report.html"
    before = {path.name for path in comparison.report(out)}
    mine = tmp_path / "report_notes.csv"
    mine.write_text("of the user")
    random = [each for each in comparison.evaluations if each.name == "random, linear"]
    alone = replace(
        comparison, evaluations=random, last=random, trainings={}, differences=comparison.differences[:0],
        curves=comparison.curves[:0], curve_differences=comparison.curve_differences[:0], unpaired=[],
        metrics=comparison.metrics[comparison.metrics["checkpoint"] == "random, linear"],
        reliability=comparison.reliability[:0],
    )  # fmt: skip
    names = {path.name for path in alone.report(out)}
    empty = {name for name, table in alone.tables.items() if not len(table)}
    assert {"differences", "curves", "reliability", "site_leakage", "brain_age"} <= empty
    assert names & {f"report_{name}.csv" for name in alone.tables} == {
        f"report_{name}.csv" for name in alone.tables if name not in empty
    }
    assert {path.name for path in tmp_path.iterdir()} == names | {mine.name}
    assert {"report_reliability.csv", "report_reliability.png", "report_learning_curve.png"} <= before - names
    assert (tmp_path / "report.tex").read_text().count("\\begin{table}") == 1


def test_latex_has_metrics_differences_site_leakage_brain_age_and_reliability(comparison, written):
    text = next(path for path in written if path.suffix == ".tex").read_text()
    assert text == to_latex(comparison)
    tables = text.split("\\begin{table}")[1:]
    heads = [table.split("\\toprule\n")[1].split(" \\\\")[0].split(" & ") for table in tables]
    assert [head[:2] for head in heads] == [
        ["checkpoint", "schizophrenia, AUC"], ["task", "metric"], ["checkpoint", "sites"], ["checkpoint", "task"],
        ["checkpoint", "compared"],
    ]  # fmt: skip
    for table, head in zip(tables, heads, strict=True):
        body = table.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
        assert {len(line.split(" & ")) for line in body} == {len(head)}
        assert f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}" in table
    leakage = comparison.site_leakage.set_index("checkpoint").loc[Y_AWARE, "leakage"]
    assert f"{Y_AWARE} & 3 & " in tables[2]
    assert f"{leakage:.3f}" in tables[2]


def test_latex_escapes_special_characters_and_sets_minus_signs():
    assert escape("a_b & 5% of $x^2$ \\ {z}") == r"a\_b \& 5\% of \$x\textasciicircum{}2\$ \textbackslash{} \{z\}"
    assert escape("-0.5 [-1, 2] y-aware, step-2, 20-39") == "$-$0.5 [$-$1, 2] y-aware, step-2, 20-39"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, a Debian package")
@pytest.mark.parametrize("width", [1200, 480])
def test_a_browser_shows_the_page_without_sideways_scrolling(page, tmp_path, width):
    """A script writes the width of the content into the title; the browser has no network."""
    report = "document.documentElement.scrollWidth + ' ' + [...document.images].every(i => i.naturalWidth > 0)"
    script = f"<script>document.title = {report}</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    options = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9",
        f"--window-size={width},1000",
    ]  # fmt: skip
    address = (tmp_path / "page.html").as_uri()
    content = subprocess.run(
        [*options, "--dump-dom", address], capture_output=True, text=True, timeout=600, check=True
    ).stdout
    title = re.search(r"<title>(\d+) (\w+)</title>", content)
    assert title
    assert int(title.group(1)) <= max(width, 500)  # chromium has no window narrower than 500
    assert title.group(2) == "true"
    for option, name in (("--screenshot", "page.png"), ("--print-to-pdf", "page.pdf")):
        subprocess.run([*options, f"{option}={tmp_path / name}", address], capture_output=True, timeout=600, check=True)
        assert (tmp_path / name).stat().st_size > 20_000
