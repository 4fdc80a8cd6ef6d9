"""The comparison from a store in which only evaluations are left: tables, differences, report, LaTeX."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.comparison import sections, tables
from evaluation.comparison.comparison import compare
from evaluation.comparison.curves import curve_differences
from evaluation.comparison.latex import escape, to_latex
from evaluation.comparison.plots import forest, pyplot, series_of
from evaluation.comparison.report import write_report
from evaluation.protocols.variant import ProtocolVariant
from evaluation.statistics.metrics import auc, brier, with_interval
from evaluation.statistics.paired import delong_difference, holm
from evaluation.tasks.published import PUBLISHED
from infra import cli
from infra.tracking.tracker import Tracker
from tests.evaluation.comparison.stored import evaluation, people, predictions

T_OF_9 = 2.2621571628540993  # Student's t at 0.975 with 9 degrees of freedom, as of 10 draws
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    uri = f"sqlite:///{root}/mlflow.db"
    tracker = Tracker.open(uri, "kept", "y-aware", tags={"yaware.kind": "pretraining"})
    tracker.log_params({"loss.name": "y-aware", "loss.note": "5 & <6>"})
    tracker.log_metrics(
        [(m, 1.0 + 1 / (s + 1), s) for s in range(30) for m in ("loss", "lr", "grad_norm", "scans_per_second")]
    )
    tracker.end()
    scans, mine = people(), {"yaware.pretraining_run": str(tracker.run_id), "yaware.protocol": "linear"}
    kept = {"scz.auc": 0.7, "scz.auc.low": 0.6, "scz.auc.high": 0.8}
    evaluation(uri, root / "a", "y-aware", 100, 0.3, scans=scans, tags=mine, tasks=("scz", "age", "site"))
    evaluation(
        uri, root / "b", "y-aware", 200, 0.9, scans=scans, tags=mine, tasks=("scz", "age", "site"), saliency=True
    )
    evaluation(uri, root / "c", "SimCLR", 200, 0.5, scans=scans, tasks=("scz", "age", "site"), metrics=kept,
               tags={"yaware.protocol": "linear"})  # fmt: skip
    evaluation(
        uri,
        root / "d",
        "random",
        0,
        0.05,
        scans=scans[:-9],
        tasks=("scz",),
        sizes=(),
        tags={"yaware.protocol": "linear"},
    )
    outside = {"leave_site_out": "True"}
    evaluation(uri, root / "e", "y-aware", 200, 0.9, scans=scans, tags={**mine, "yaware.leave_site_out": "True"},
               tasks=("age",), params=outside, metrics={"age.mae": 5.5, "age.mae.low": 5.0, "age.mae.high": 6.0})  # fmt: skip
    return uri


@pytest.fixture(scope="module")
def comparison(store):
    return compare("kept", tracking_uri=store)


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    return write_report(comparison, tmp_path_factory.mktemp("out") / "report.html")


def test_figures_are_those_logged_or_made_from_stored_answers(comparison):
    table = comparison.table.set_index(["checkpoint", "task", "metric"])
    logged = table.loc[("SimCLR, linear", "scz", "auc")]
    assert (logged["value"], logged["low"], logged["high"]) == (0.7, 0.6, 0.8)
    each = next(e for e in comparison.judged if e.name == "y-aware, step 200, linear")
    part = each.of("scz")
    labels, people_ = part["label"].to_numpy(int), part["participant"].to_numpy()
    found = table.loc[("y-aware, step 200, linear", "scz", "auc")]
    assert tuple(found[["value", "low", "high"]]) == with_interval(auc, labels, part["answer"].to_numpy(), people_)
    assert table.loc[("y-aware, step 200, linear", "scz", "brier"), "value"] == brier(
        labels, part["probability"].to_numpy()
    )
    assert found["p_chance"] < 0.01
    assert table.loc[("random, linear", "scz", "auc"), "p_chance"] > 0.05
    assert np.isnan(table.loc[("random, linear", "scz", "ap"), "p_chance"])


def test_pairs_are_the_last_steps_judged_on_the_same_scans(comparison):
    table = comparison.differences
    assert {(r.task, r.first, r.second) for r in table.itertuples()} == {
        (task, "y-aware, step 200, linear", "SimCLR, linear") for task in ("scz", "age", "site")
    }
    assert sorted(comparison.unpaired) == [
        "scz: SimCLR, linear and random, linear were judged on different scans or labels",
        "scz: y-aware, step 200, linear and random, linear were judged on different scans or labels",
    ]
    row = table[table["task"] == "scz"].iloc[0]
    one, other = (
        next(e for e in comparison.judged if e.name == name).of("scz") for name in (row["first"], row["second"])
    )
    found = delong_difference(one["label"].to_numpy(), one["answer"].to_numpy(), other["answer"].to_numpy(),
                              one["participant"].to_numpy())  # fmt: skip
    assert tuple(row[["difference", "low", "high", "p"]]) == (found.value, found.low, found.high, found.p)
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p"].to_numpy()))
    assert set(table.loc[table["task"] != "scz", "test"]) == {"bootstrap"}


def named(protocol, count=1, name=None, leave_site_out=False):
    """Evaluations of which only the protocol matters."""
    evaluates = {"voxels": "shards", "scratch": "architecture"}.get(protocol, "checkpoint")
    variant = ProtocolVariant(protocol, evaluates=evaluates, leave_site_out=leave_site_out)
    run = {"tags": variant.to_tags(), "params": {}}
    return [
        tables.Judged(f"{name or variant.label} {n}", run, pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
        for n in range(count)
    ]


def test_pairs_are_of_one_protocol_and_baselines_of_the_same_folds():
    judged = [
        *named("linear", 2), *named("finetune", 2), *named("linear", 2, leave_site_out=True), *named("voxels"),
        *named("scratch", name="scratch resnet18"), *named("voxels", leave_site_out=True),
    ]  # fmt: skip
    inside = ["linear 0", "linear 1", "finetune 0", "finetune 1"]
    outside = ["linear, sites left out 0", "linear, sites left out 1"]
    expected = {(pair[0], pair[1]) for pair in (inside[:2], inside[2:], outside)}
    expected |= {(one, other) for one in inside for other in ("voxels 0", "scratch resnet18 0")}
    expected |= {("voxels 0", "scratch resnet18 0")} | {(one, "voxels, sites left out 0") for one in outside}
    assert {(one.name, other.name) for one, other in tables.pairs(judged)} == expected
    found = [(one.name, other.name) for one, other in tables.pairs(judged, "linear 0")]
    assert found == [(other, "linear 0") for other in ("linear 1", "voxels 0", "scratch resnet18 0")]


def test_many_checkpoints_of_a_protocol_are_compared_with_its_first():
    few = [*named("paper", 3), *named("knn", 3), *named("mlp", 3)]
    assert len(list(tables.pairs(few))) == 9  # three protocols of three pairs, whatever there is of others
    many = [*named("paper", 7), *named("knn", 2), *named("voxels")]
    found = {(one.name, other.name) for one, other in tables.pairs(many)}
    assert {pair for pair in found if "paper" in pair[0] and "paper" in pair[1]} == {
        ("paper 0", f"paper {n}") for n in range(1, 7)
    }
    assert found - {("paper 0", f"paper {n}") for n in range(1, 7)} == {
        ("knn 0", "knn 1"), ("paper 0", "voxels 0"), ("knn 0", "voxels 0"), ("knn 1", "voxels 0"),
    }  # fmt: skip


def test_against_one_checkpoint(store, comparison, capsys):
    found, left_out = tables.differences_table(comparison.last, "SimCLR, linear")
    assert set(found["second"]) == {"SimCLR, linear"}
    assert len(left_out) == 1
    assert cli.run(["compare", "--experiment", "kept", "--tracking-uri", store, "--against", "SimCRL"]) == 2
    assert "--against=SimCRL is none of the checkpoints: " in capsys.readouterr().err
    assert cli.run(["compare", "--experiment", "kept", "--tracking-uri", store, "--filter", "tags.x = 'y'"]) == 2
    assert "no finished evaluation that fits --filter \"tags.x = 'y'\"" in capsys.readouterr().err


def test_evaluations_of_one_checkpoint_on_other_tasks_are_one(tmp_path, capsys):
    """Evaluated on scz and age, later on age and site, and a second time with a knn: nothing is hidden."""
    uri, scans = f"sqlite:///{tmp_path}/mlflow.db", people()
    tags = {"yaware.protocol": "linear"}
    asked = {
        "params": {"tasks": "scz,age", "seed": 1},
        "metrics": {"age.mae": 1.0, "age.mae.low": 0.9, "age.mae.high": 1.1},
    }
    first = evaluation(
        uri, tmp_path / "a", "x", 1, 0.9, scans=scans, tasks=("scz", "age"), tags=tags, saliency=True, **asked
    )
    newer = evaluation(uri, tmp_path / "b", "x", 1, 0.2, scans=scans, tasks=("age", "site"), tags=tags, sizes=())
    evaluation(
        uri, tmp_path / "c", "x", 1, 0.2, scans=scans, tasks=("site",), tags={"yaware.protocol": "knn"}, sizes=()
    )
    found = compare("kept", tracking_uri=uri)
    assert {each.name: set(each.tasks) for each in found.judged} == {
        "x, linear": {"scz", "age", "site"},
        "x, knn": {"site"},
    }
    mine = next(each for each in found.judged if each.name == "x, linear")
    assert {task: mine.run_of(task)["run_id"] for task in mine.tasks} == {"scz": first, "age": newer, "site": newer}
    assert found.table.set_index(["checkpoint", "task", "metric"]).loc[("x, linear", "age", "mae"), "value"] != 1.0
    assert set(mine.curve["task"]) == {"scz"}
    assert set(mine.saliency) == {"scz"}
    assert found.superseded == [f"x, linear: age of evaluation {first[:10]}, by {newer[:10]}"]
    rows = [(row["checkpoint"], row["evaluation run"]) for row in found.provenance]
    assert {("x, linear (scz)", first[:10]), ("x, linear (age, site)", newer[:10])} < set(rows)
    assert cli.run(["compare", "--experiment", "kept", "--tracking-uri", uri, "--out", str(tmp_path / "out.html")]) == 0
    assert f"superseded: {found.superseded[0]}" in capsys.readouterr().out.replace("\n", " ")
    assert found.superseded[0] in (tmp_path / "out.html").read_text()


def test_an_evaluation_wholly_done_again_is_not_read(tmp_path):
    uri, scans = f"sqlite:///{tmp_path}/mlflow.db", people()
    given = {"scans": scans, "tasks": ("scz",), "params": {"tasks": "scz"}}
    old = evaluation(uri, tmp_path / "a", "x", 1, 0.2, tags={"yaware.manifest_digest": "b" * 64}, **given)
    new = evaluation(uri, tmp_path / "b", "x", 1, 0.9, **given)
    found = compare("kept", tracking_uri=uri)
    assert [row["evaluation run"] for row in found.provenance] == [new[:10]]
    assert len(found.judged[0].predictions) == len(scans)
    assert found.superseded == [f"x: scz of evaluation {old[:10]} on other shards, by {new[:10]}"]


def test_checkpoints_of_equal_names_are_told_apart(tmp_path):
    uri, scans = f"sqlite:///{tmp_path}/mlflow.db", people()
    trained = []
    for number in range(2):
        tracker = Tracker.open(uri, "kept", "x", tags={"yaware.kind": "pretraining"})
        tracker.log_params({"seed": number})
        tracker.end()
        trained.append(str(tracker.run_id))
        tags = {"yaware.pretraining_run": trained[-1], "yaware.weights_sha256": str(number) * 64}
        evaluation(uri, tmp_path / f"{number}", "x", 5 + number, 0.5, scans=scans, tasks=("scz",), tags=tags)
    again = {"yaware.pretraining_run": trained[0], "yaware.weights_sha256": "9" * 64}
    evaluation(uri, tmp_path / "again", "x", 5, 0.5, scans=scans, tasks=("scz",), tags=again)
    for leave_site_out in (False, True):
        variant = ProtocolVariant("voxels", evaluates="shards", leave_site_out=leave_site_out)
        tags = {**variant.to_tags(), "yaware.weights_sha256": ""}
        evaluation(uri, tmp_path / variant.label, "voxels", 0, 0.5, scans=scans, tasks=("scz",), tags=tags)
    found = compare("kept", tracking_uri=uri)
    one, other = (f"x ({run[:8]})" for run in trained)
    assert {each.name for each in found.last} == {
        f"{one}, weights 00000000", f"{one}, weights 99999999", other, "voxels", "voxels, sites left out",
    }  # fmt: skip
    assert {name: recipe["seed"] for name, recipe in found.recipes.items()} == {one: "0", other: "1"}
    assert found.superseded == []
    assert not series_of(found)  # steps 5 and 6 are not of one run


def test_runs_are_followed_over_their_steps(comparison):
    assert [[each.step for each in members] for members in series_of(comparison).values()] == [[100, 200]]


def test_learning_curves_have_corrected_intervals(comparison):
    mine = comparison.curves[comparison.curves["checkpoint"] == "y-aware, step 200, linear"]
    assert mine["n_train"].tolist() == [20, 40, 80]
    # 130 participants in five folds: 26 a test set, so the interval is the wider the smaller the training set.
    each = next(e for e in comparison.judged if e.name == "y-aware, step 200, linear")
    values = each.curve.loc[each.curve["n_train"] == 20, "auc"]
    half = T_OF_9 * np.sqrt((1 / 10 + 26 / 20) * values.var(ddof=1))
    assert (mine["high"] - mine["low"]).iloc[0] / 2 == pytest.approx(half)


def test_differences_at_each_training_size_are_paired_by_draw(comparison):
    table = comparison.curve_differences
    assert set(zip(table["first"], table["second"], strict=True)) == {("y-aware, step 200, linear", "SimCLR, linear")}
    one, other = (
        next(e for e in comparison.judged if e.name == name).curve
        for name in ("y-aware, step 200, linear", "SimCLR, linear")
    )
    gaps = (one["auc"] - other["auc"])[one["n_train"] == 80]
    row = table[table["n_train"] == 80].iloc[0]
    assert row["difference"] == pytest.approx(gaps.mean())
    assert (row["high"] - row["low"]) / 2 == pytest.approx(T_OF_9 * np.sqrt((1 / 10 + 26 / 80) * gaps.var(ddof=1)))
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p"].to_numpy()))


def with_curve(name, *, fold=0, label=0.0, **params):
    """An evaluation of 40 scans in five folds with three draws; its folds turned by ``fold``."""
    number = np.arange(40)
    part = pd.DataFrame(
        {"task": "scz", "kind": "binary", "key": number.astype(str), "participant": number.astype(str),
         "label": np.where(number == 0, label, number % 2), "fold": (number + fold) % 5}
    )  # fmt: skip
    curve = pd.DataFrame({"task": "scz", "n_train": 20, "draw": [0, 1, 2], "auc": [0.6, 0.7, 0.65]})
    return tables.Judged(
        name, {"tags": {}, "params": {"seed": "0", "folds": "5", **params}}, part, curve, pd.DataFrame()
    )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (with_curve("b", seed="1"), "--seed was 0 and 1, so the draws differ"),
        (with_curve("b", folds="10"), "--folds was 5 and 10, so the draws differ"),
        (with_curve("b", leave_site_out="True"), "--leave-site-out was False and True, so the draws differ"),
        (with_curve("b", fold=1), "their scans are in other folds or have other labels, so the draws differ"),
        (with_curve("b", label=1.0), "their scans are in other folds or have other labels, so the draws differ"),
    ],
)  # fmt: skip
def test_draws_of_other_seeds_and_folds_are_not_paired(other, reason):
    table, left_out = curve_differences([with_curve("a"), other])
    assert len(table) == 0
    assert left_out == [f"scz: learning curves of a and b: {reason}"]


def test_draws_in_common_are_paired_however_many_were_asked_for():
    more = with_curve("b", draws="20", leave_site_out="False")
    table, left_out = curve_differences([with_curve("a", draws="3"), more])
    assert (len(table), left_out) == (1, [])


def test_site_and_age(comparison):
    sites = tables.site_table(comparison.judged).set_index("checkpoint")
    row = sites.loc["y-aware, step 200, linear"]
    assert row["openbhb"] == pytest.approx(row["bacc"] ** 0.3 * 5.5)
    assert np.isnan(sites.loc["SimCLR, linear", "openbhb"])


LINEAR = ProtocolVariant("linear", model="linear")
PAPER = ProtocolVariant("paper", model="linear")
LAYER3 = replace(LINEAR, layer="layer3", pooling=("mean",))
KNN = ProtocolVariant("knn", model="knn")


@pytest.mark.parametrize(
    ("inside", "outside", "scored"),
    [(LINEAR, LINEAR, True), (PAPER, LINEAR, True), (LAYER3, LAYER3, True), (LINEAR, KNN, False), (LAYER3, LINEAR, False)],
)  # fmt: skip
def test_openbhb_score_is_of_one_model(inside, outside, scored):
    """Balanced accuracy by one probe and MAE by another, or on other features, make no score."""
    scans = people()

    def judged(task, variant):
        tags = {"yaware.step": "1", **variant.to_tags()}
        run = {"run_id": task, "tags": tags, "params": {}, "metrics": {"age.mae": 5.0} if task == "age" else {}}
        return tables.Judged(task, run, predictions(scans, 0.5, 0, (task,)), pd.DataFrame(), pd.DataFrame())

    outer = judged("age", replace(outside, leave_site_out=True))
    table = tables.site_table([outer, judged("site", inside)])
    assert np.isfinite(table["openbhb"]).tolist() == [scored]


def test_brain_age_gaps_are_free_of_age(comparison):
    ages = tables.brain_age_table(comparison.last).set_index("checkpoint")
    assert (ages["r_raw"] < -0.4).all()
    assert (ages["r_corrected"].abs() < 0.1).all()


def test_brain_age_of_people_scanned_at_two_sites_that_were_left_out_apart():
    part = predictions(people(), 0.5, 0, ("age",))
    part = part.assign(fold=np.arange(len(part)) % 4)
    assert part.groupby("participant")["fold"].nunique().max() == 2
    judged = tables.Judged("x", {"tags": {}, "params": {}}, part, pd.DataFrame(), pd.DataFrame())
    (row,) = tables.brain_age_table([judged]).itertuples()
    assert abs(row.r_corrected) < 0.1


def test_years_are_said_of_ages_alone(comparison):
    """A number of which nobody said the unit has none, be it called language."""
    assert comparison.label("age", "mae") == "MAE (years)"
    assert comparison.label("age", "r2") == "R²"
    renamed = []
    for each in comparison.judged:
        part = each.predictions.replace({"task": {"age": "language"}})
        renamed.append(replace(each, predictions=part.assign(label=part["label"] / 10)))
    other = replace(comparison, judged=renamed, last=renamed, table=comparison.table.replace({"age": "language"}))
    assert other.label("language", "mae") == "MAE"
    assert "MAE ↓" in sections.figures(other)
    assert "years" not in sections.figures(other)
    for comparison_, text in ((comparison, "MAE (years)"), (other, "MAE")):
        drawn = forest(comparison_)
        assert {axis.get_xlabel() for axis in drawn.axes if "MAE" in axis.get_xlabel()} == {text}
        pyplot().close(drawn)


def test_the_report_is_whole_and_offline(comparison, written):
    page = written[0].read_text()
    assert all(path.stat().st_size for path in written)
    assert not re.search(r"(src|href)=['\"]?(https?:|//|/)", page)
    assert "<script" not in page
    for title in ("Figures by task", "Learning curves", "Paired differences", "Over pretraining", "Calibration", "Subgroups",
                  "Scanner and age", "What the features hold", "Where in the brain", "Pretraining", "Provenance"):  # fmt: skip
        assert re.search(rf"<h2 id='?\"?\w+'?\"?>{title}</h2>", page)
    assert "The same by UMAP" not in page
    assert page.count("<img ") == sum(path.suffix == ".png" for path in written)
    assert "Simulated data" in page
    assert "5 &amp; &lt;6&gt;" in page  # what a store holds is text, not HTML
    island = re.search(r"site island</td>.*?</tr>", page)
    assert island
    assert "fewer than 20 participants" in island.group()


def test_published_values_are_marked_and_kept_out_of_pictures_of_simulated_data(comparison, written):
    page = written[0].read_text()
    assert f"{PUBLISHED['scz'][500]['y-Aware']:.3f}" in page
    assert "Not measured here." in page
    assert "class='reference'" in page
    assert sections.published_tasks(comparison) == ["scz"]


def test_tables_beside_the_report(comparison, written):
    figures = pd.read_csv(next(path for path in written if path.name == "report_metrics.csv"))
    assert figures["value"].to_numpy() == pytest.approx(comparison.table["value"].to_numpy())
    text = next(path for path in written if path.suffix == ".tex").read_text()
    assert text == to_latex(comparison)
    for name in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{name}\n") == 2
    columns = {
        line.count("&") for line in text.split("\\midrule")[1].split("\\bottomrule")[0].splitlines() if "&" in line
    }
    assert columns == {3}
    assert "Simulated data." in text
    assert escape("a_b & 5% of $x^2$ \\ {z}") == (
        r"a\_b \& 5\% of \$x\textasciicircum{}2\$ \textbackslash{} \{z\}"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, a Debian package")
@pytest.mark.parametrize("width", [1200, 480])
def test_a_browser_shows_the_report_without_sideways_scrolling(written, tmp_path, width):
    """The page says itself, in its title, how wide its content is; the network is off."""
    page = written[0].read_text()
    says = "document.documentElement.scrollWidth + ' ' + [...document.images].every(i => i.naturalWidth > 0)"
    probe = f"<script>document.title = {says}</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{probe}</body>"))
    options = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9",
        f"--window-size={width},1000",
    ]  # fmt: skip
    address = (tmp_path / "page.html").as_uri()
    shown = subprocess.run(
        [*options, "--dump-dom", address], capture_output=True, text=True, timeout=200, check=True
    ).stdout
    title = re.search(r"<title>(\d+) (\w+)</title>", shown)
    assert title
    assert int(title.group(1)) <= max(width, 500)  # chromium has no window narrower than 500
    assert title.group(2) == "true"
    for option, name in (("--screenshot", "page.png"), ("--print-to-pdf", "page.pdf")):
        subprocess.run([*options, f"{option}={tmp_path / name}", address], capture_output=True, timeout=200, check=True)
        assert (tmp_path / name).stat().st_size > 20_000
