"""The comparison's tables: metrics, differences, learning curves, subgroups, calibration, site leakage, brain age."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from evaluation.comparison.age_and_site import age_correlation, brain_age_table, site_leakage_table
from evaluation.comparison.curves import curve_differences
from evaluation.comparison.evaluations import CheckpointEvaluation
from evaluation.comparison.formats import verdict
from evaluation.comparison.tables import differences_table, metrics_table, subgroups_table
from evaluation.protocols.variant import ProtocolVariant
from evaluation.statistics.metrics import auc, brier, site_leakage, with_interval
from evaluation.statistics.paired import delong_difference, holm
from tests.evaluation.comparison.stored import PEOPLE, people, predictions

T_OF_9 = 2.2621571628540993  # Student's t at 0.975 with 9 degrees of freedom, for 10 draws
Y_AWARE, SIMCLR, RANDOM = "y-aware, step 200, linear", "SimCLR, linear", "random, linear"


def evaluation_named(comparison, name):
    return next(evaluation for evaluation in comparison.evaluations if evaluation.name == name)


def test_metrics_are_those_logged_or_computed_from_stored_predictions(comparison):
    table = comparison.metrics.set_index(["checkpoint", "task", "metric"])
    logged = table.loc[(SIMCLR, "scz", "auc")]
    assert tuple(logged[["fixed_value", "fixed_low", "fixed_high"]]) == (0.7, 0.6, 0.8)
    scz = evaluation_named(comparison, Y_AWARE).predictions_of("scz")
    labels, participants = scz["label"].to_numpy(int), scz["participant"].to_numpy()
    computed = table.loc[(Y_AWARE, "scz", "auc")]
    expected = with_interval(auc, labels, scz["answer"].to_numpy(), participants)
    assert tuple(computed[["fixed_value", "fixed_low", "fixed_high"]]) == expected
    assert table.loc[(Y_AWARE, "scz", "brier"), "fixed_value"] == brier(labels, scz["probability"].to_numpy())


def test_evaluations_that_logged_the_mean_over_repeats_have_the_first_cross_validation_beside_it(comparison):
    simclr = evaluation_named(comparison, SIMCLR)
    run = simclr.run_of("scz")
    fixed = {"scz.auc.fixed": 0.72, "scz.auc.fixed.low": 0.61, "scz.auc.fixed.high": 0.83}
    newer = replace(simclr, run={**run, "metrics": {**run["metrics"], **fixed}})
    before, after = (
        metrics_table([each]).set_index(["task", "metric"]).loc[("scz", "auc")] for each in (simclr, newer)
    )
    shown = ["value", "low", "high", "covers"]
    assert tuple(after[shown]) == tuple(before[shown])
    assert tuple(after[["fixed_value", "fixed_low", "fixed_high"]]) == (0.72, 0.61, 0.83)


def test_one_metric_has_one_value_in_all_tables(comparison):
    """The repeats are shifted, so that their mean is not the value of the first cross-validation."""
    y_aware, left_out = (
        evaluation_named(comparison, name) for name in (Y_AWARE, "y-aware, step 200, linear, sites left out")
    )
    resamples = y_aware.resamples.copy()
    resamples.loc[resamples["kind"] == "repeat", "value"] *= 0.9
    shifted = replace(y_aware, resamples=resamples)
    shifted_left_out = replace(left_out, resamples=resamples[resamples["task"] == "age"])
    table = metrics_table([shifted]).set_index(["task", "metric"])["value"]
    mae, bacc = table["age", "mae"], table["site", "bacc"]
    assert mae == pytest.approx(0.9 * metrics_table([y_aware]).set_index(["task", "metric"])["value"]["age", "mae"])
    assert brain_age_table([shifted])["mae"].tolist() == [mae]
    row = site_leakage_table([shifted, shifted_left_out]).iloc[0]
    assert (row["bacc"], row["external_mae"]) == (bacc, mae)
    assert row["leakage"] == pytest.approx((bacc - 1 / 3) / (1 - 1 / 3))
    assert row["openbhb"] == pytest.approx(bacc**0.3 * mae)


def test_chance_level_and_p_are_given_for_the_primary_metric_only(comparison):
    table = comparison.metrics.set_index(["checkpoint", "task", "metric"])
    assert table.loc[(Y_AWARE, "scz", "auc"), "p_chance"] < 0.01
    assert table.loc[(Y_AWARE, "scz", "auc"), "p_fixed"] < 0.01
    assert table.loc[(RANDOM, "scz", "auc"), "p_fixed"] > 0.05
    assert table.loc[(Y_AWARE, "scz", "auc"), "chance_test"] == "halves"
    assert np.isnan(table.loc[(RANDOM, "scz", "auc"), "p_chance"])  # it has no halves
    assert table.loc[(RANDOM, "scz", "ap"), ["chance", "p_chance"]].isna().all()
    ages = people()["age"]
    chance = [table.loc[(Y_AWARE, *key), "chance"] for key in (("scz", "auc"), ("site", "bacc"), ("age", "mae"))]
    assert chance == pytest.approx([0.5, 1 / 3, (ages - ages.median()).abs().mean()])


def test_differences_are_between_last_steps_on_the_same_scans(comparison):
    table = comparison.differences
    assert {(r.task, r.first, r.second) for r in table.itertuples()} == {
        (task, Y_AWARE, SIMCLR) for task in ("scz", "age", "site")
    }
    assert sorted(comparison.unpaired) == [
        f"scz: {SIMCLR} and {RANDOM} were evaluated on different scans or labels",
        f"scz: {Y_AWARE} and {RANDOM} were evaluated on different scans or labels",
    ]
    row = table[table["task"] == "scz"].iloc[0]
    first, second = (evaluation_named(comparison, row[name]).predictions_of("scz") for name in ("first", "second"))
    expected = delong_difference(
        first["label"].to_numpy(), first["answer"].to_numpy(), second["answer"].to_numpy(), first["participant"].to_numpy()
    )  # fmt: skip
    values = tuple(row[["fixed_difference", "fixed_low", "fixed_high", "fixed_p"]])
    assert values == (expected.value, expected.low, expected.high, expected.p)
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p"].to_numpy()))
    assert set(table.loc[table["task"] != "scz", "fixed_test"]) == {"bootstrap"}


def values_of(evaluation, kind, metric="auc"):
    """Values of scz by (number, side)."""
    table = evaluation.resamples.query("task == 'scz' and metric == @metric and kind == @kind")
    return table.set_index(["number", "side"])["value"]


def test_the_default_interval_and_test_include_the_training_sets(comparison):
    one, other = (evaluation_named(comparison, name) for name in (Y_AWARE, SIMCLR))
    row = comparison.differences.query("task == 'scz'").iloc[0]
    value = np.mean([values_of(one, "repeat")[n, 0] - values_of(other, "repeat")[n, 0] for n in range(3)])
    both = values_of(one, "half") - values_of(other, "half")
    error = np.sqrt(np.mean([(both[n, 0] - both[n, 1]) ** 2 / 4 for n in range(10)]))
    half = 2.2281388519649385 * error  # Student's t at 0.975 with 10 degrees of freedom
    assert tuple(row[["difference", "low", "high"]]) == pytest.approx((value, value - half, value + half))
    assert (row["test"], row["fixed_test"]) == ("halves", "DeLong")
    shown = comparison.metrics.set_index(["checkpoint", "task", "metric"]).loc[(Y_AWARE, "scz", "auc")]
    assert shown["value"] == pytest.approx(np.mean([values_of(one, "repeat")[n, 0] for n in range(3)]))
    assert shown["covers"] == "people and training sets"
    assert comparison.metrics.set_index("checkpoint").loc[RANDOM, "covers"].unique().tolist() == ["people"]


def test_a_pair_without_common_halves_has_no_verdict(comparison):
    one, other = (evaluation_named(comparison, name) for name in (Y_AWARE, SIMCLR))
    seeded = replace(other, run={**other.run, "params": {**other.run["params"], "seed": "1"}})
    cases = {
        "has no halves": replace(other, resamples=pd.DataFrame()),
        "--seed was 0 and 1, so the halves differ": seeded,
        "too few common halvings": replace(other, resamples=other.resamples.query("number < 4")),
    }
    for reason, changed in cases.items():
        table, unpaired = differences_table([one, changed])
        row = table.query("task == 'scz'").iloc[0]
        assert row["test"] == "none"
        assert row[["low", "high", "p", "p_holm"]].isna().all()
        assert row["fixed_p"] < 0.05
        assert verdict(row) == "not tested: training sets not resampled"
        assert any(line.startswith("scz: training sets") and reason in line for line in unpaired)


def test_refitted_permutations_decide_about_chance_where_there_are_any(comparison):
    one = evaluation_named(comparison, Y_AWARE)
    first = values_of(one, "repeat")[0, 0]
    permuted = pd.DataFrame(
        {"task": "scz", "metric": "auc", "kind": "permuted", "number": range(19), "side": 0, "chance": 0.5,
         "value": [first, np.nan, *np.linspace(0.3, first - 0.01, 17)]}
    )  # fmt: skip
    with_permutations = replace(one, resamples=pd.concat([one.resamples, permuted], ignore_index=True))
    row = metrics_table([with_permutations]).query("task == 'scz' and metric == 'auc'").iloc[0]
    assert (row["p_chance"], row["chance_test"]) == (3 / 20, "refit")  # the equal one and the undefined one count


def test_learning_curves_have_intervals_corrected_for_overlapping_draws(comparison):
    table = comparison.curves[comparison.curves["checkpoint"] == Y_AWARE]
    assert table["n_train"].tolist() == [20, 40, 80]
    curve = evaluation_named(comparison, Y_AWARE).curve
    values = curve.loc[curve["n_train"] == 20, "auc"]
    test_people = PEOPLE / 5  # of one fold
    half = T_OF_9 * np.sqrt((1 / 10 + test_people / 20) * values.var(ddof=1))
    low, value, high = (np.log(table[name].iloc[0] / (1 - table[name].iloc[0])) for name in ("low", "auc", "high"))
    of_logit = half / (values.mean() * (1 - values.mean()))  # by the delta method
    assert [value - low, high - value] == pytest.approx([of_logit, of_logit])


def test_learning_curve_differences_are_paired_by_draw(comparison):
    table = comparison.curve_differences
    assert set(zip(table["first"], table["second"], strict=True)) == {(Y_AWARE, SIMCLR)}
    first, second = (evaluation_named(comparison, name).curve for name in (Y_AWARE, SIMCLR))
    differences = (first["auc"] - second["auc"])[first["n_train"] == 80]
    row = table[table["n_train"] == 80].iloc[0]
    assert row["difference"] == pytest.approx(differences.mean())
    half = T_OF_9 * np.sqrt((1 / 10 + PEOPLE / 5 / 80) * differences.var(ddof=1))
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half)
    assert table["p_holm"].to_numpy() == pytest.approx(holm(table["p"].to_numpy()))


def with_curve(name, *, shift_folds=0, first_label=0.0, **params):
    """An evaluation of 40 scans in five folds with three draws of 20 training scans."""
    number = np.arange(40)
    table = pd.DataFrame(
        {"task": "scz", "kind": "binary", "key": number.astype(str), "participant": number.astype(str),
         "label": np.where(number == 0, first_label, number % 2), "fold": (number + shift_folds) % 5}
    )  # fmt: skip
    curve = pd.DataFrame({"task": "scz", "n_train": 20, "draw": [0, 1, 2], "auc": [0.6, 0.7, 0.65]})
    run = {"tags": {}, "params": {"seed": "0", "folds": "5", **params}}
    return CheckpointEvaluation(name, run, table, curve, pd.DataFrame())


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (with_curve("b", seed="1"), "--seed was 0 and 1, so the draws differ"),
        (with_curve("b", folds="10"), "--folds was 5 and 10, so the draws differ"),
        (with_curve("b", leave_site_out="True"), "--leave-site-out was False and True, so the draws differ"),
        (with_curve("b", shift_folds=1), "the folds or labels of their scans differ, so the draws differ"),
        (with_curve("b", first_label=1.0), "the folds or labels of their scans differ, so the draws differ"),
    ],
)  # fmt: skip
def test_draws_with_other_seeds_or_folds_are_not_paired(other, reason):
    table, unpaired = curve_differences([with_curve("a"), other])
    assert len(table) == 0
    assert unpaired == [f"scz: learning curves of a and b: {reason}"]


def test_common_draws_are_paired_if_the_numbers_of_draws_differ():
    more_draws = with_curve("b", draws="20", leave_site_out="False")
    table, unpaired = curve_differences([with_curve("a", draws="3"), more_draws])
    assert (len(table), unpaired) == (1, [])


def test_subgroups_hold_the_primary_metric_of_their_scans(comparison):
    table = comparison.subgroups.set_index(["checkpoint", "task", "by", "group"])
    scz = evaluation_named(comparison, Y_AWARE).predictions_of("scz")
    women = scz[scz["sex"] == "F"]
    row = table.loc[(Y_AWARE, "scz", "sex", "F")]
    assert row["value"] == auc(women["label"].to_numpy(int), women["answer"].to_numpy())
    assert (row["participants"], row["scans"]) == (women["participant"].nunique(), len(women))
    assert (Y_AWARE, "site", "site", "north") not in table.index  # the site task has no subgroups by site


def test_subgroups_below_the_minimum_keep_their_row_without_a_value(comparison):
    island = comparison.subgroups.query("task == 'scz' and group == 'island'").set_index("checkpoint").loc[Y_AWARE]
    assert island["participants"] < 20
    assert np.isnan(island["value"])
    assert island["note"] == "fewer than 20 participants"
    table = subgroups_table(comparison.last, minimum=5).query("task == 'scz' and group == 'island'")
    assert table.set_index("checkpoint").loc[Y_AWARE, "note"] != "fewer than 20 participants"


def test_calibration_bins_hold_all_scans_and_rise_with_the_probability(comparison):
    table = comparison.calibration.query("checkpoint == @Y_AWARE and task == 'scz'")
    scz = evaluation_named(comparison, Y_AWARE).predictions_of("scz")
    assert len(table) == PEOPLE // 20
    assert table["scans"].sum() == len(scz)
    assert np.average(table["observed"], weights=table["scans"]) == pytest.approx(scz["label"].mean())
    assert np.average(table["predicted"], weights=table["scans"]) == pytest.approx(scz["probability"].mean())
    assert table["predicted"].is_monotonic_increasing
    assert table["low"].le(table["observed"]).all()
    assert table["high"].ge(table["observed"]).all()


def test_site_leakage_is_computed_from_the_site_task(comparison):
    row = comparison.site_leakage.set_index("checkpoint").loc[Y_AWARE]
    site = evaluation_named(comparison, Y_AWARE).predictions_of("site")
    first = site_leakage(site["label"].to_numpy(np.int64), site["answer"].to_numpy())
    assert row["leakage"] == pytest.approx(first, rel=1e-12)  # of the three repeats' mean, which is the first here
    assert row["leakage"] == pytest.approx((row["bacc"] - row["chance"]) / (1 - row["chance"]))
    assert (row["sites"], row["chance"]) == (3, 1 / 3)


def test_the_openbhb_score_needs_an_age_error_on_sites_left_out(comparison):
    table = comparison.site_leakage.set_index("checkpoint")
    row = table.loc[Y_AWARE]
    assert row["external_mae"] == 5.5
    assert row["openbhb"] == pytest.approx(row["bacc"] ** 0.3 * 5.5)
    assert table.loc[SIMCLR, ["external_mae", "openbhb"]].isna().all()


LINEAR = ProtocolVariant("linear", model="linear")
PAPER = ProtocolVariant("paper", model="linear")
LAYER3 = replace(LINEAR, layer="layer3", pooling=("mean",))
KNN = ProtocolVariant("knn", model="knn")


@pytest.mark.parametrize(
    ("site_variant", "age_variant", "scored"),
    [(LINEAR, LINEAR, True), (PAPER, LINEAR, True), (LAYER3, LAYER3, True), (LINEAR, KNN, False), (LAYER3, LINEAR, False)],
)  # fmt: skip
def test_the_openbhb_score_needs_both_values_from_one_model(site_variant, age_variant, scored):
    scans = people()

    def evaluation(task, variant):
        tags = {"yaware.step": "1", **variant.to_tags()}
        run = {"run_id": task, "tags": tags, "params": {}, "metrics": {"age.mae": 5.0} if task == "age" else {}}
        table = predictions(scans, 0.5, 0, (task,))
        return CheckpointEvaluation(task, run, table, pd.DataFrame(), pd.DataFrame())

    age = evaluation("age", replace(age_variant, leave_site_out=True))
    table = site_leakage_table([age, evaluation("site", site_variant)])
    assert np.isfinite(table["openbhb"]).tolist() == [scored]


def test_corrected_brain_age_gaps_do_not_depend_on_age(comparison):
    table = comparison.brain_age.set_index("checkpoint")
    assert (table["r_raw"] < -0.4).all()
    assert (table["r_corrected"].abs() < 0.1).all()
    age = evaluation_named(comparison, Y_AWARE).predictions_of("age")
    assert table.loc[Y_AWARE, "mae"] == pytest.approx((age["answer"] - age["label"]).abs().mean())


def test_brain_age_is_corrected_for_people_scanned_at_two_sites_in_different_folds():
    table = predictions(people(), 0.5, 0, ("age",))
    table = table.assign(fold=np.arange(len(table)) % 4)
    assert table.groupby("participant")["fold"].nunique().max() == 2
    evaluation = CheckpointEvaluation(
        "x", {"tags": {}, "params": {}, "metrics": {}}, table, pd.DataFrame(), pd.DataFrame()
    )
    (row,) = brain_age_table([evaluation]).itertuples()
    assert abs(row.r_corrected) < 0.1


def test_the_correlation_of_an_embedding_with_age_has_no_sign_and_needs_ages():
    table = pd.DataFrame({"x": [3.0, 2.0, 1.0, 0.0], "age": [20.0, 40.0, 60.0, np.nan]})
    assert age_correlation(table, "x") == pytest.approx(1.0)
    assert np.isnan(age_correlation(table.assign(age=50.0), "x"))
    assert np.isnan(age_correlation(table[["x"]], "x"))
