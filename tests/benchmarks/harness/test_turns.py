"""A row's sides run in turns; a noisy row is measured again, a bounded number of times; a side that fails leaves its error."""

from __future__ import annotations

import pytest

from tests.benchmarks.harness.row import ROUND, Row, Side
from tests.benchmarks.harness.statistics import ratio, ratios, spread_of, summary
from tests.benchmarks.harness.turns import CaseFailed, run_case, run_row

SIDES = (Side("ours", "a:b"), Side("theirs", "c:d", peer=True))


def row(**more):
    return Row("r", "S", "title", "ms", SIDES, 10, **more)


def runner(cpu):
    """A run that gives each side its values one after another, and the list of who ran."""
    ran, left = [], {name: iter(values) for name, values in cpu.items()}

    def run(side):
        ran.append(side.name)
        value = next(left[side.name])
        if isinstance(value, str):
            raise CaseFailed(value)
        return {"cpu": value, "wall": 2 * value}

    return run, ran


def test_the_spread_is_the_range_relative_to_the_median():
    assert summary([4.0, 2.0, 5.0]) == {"median": 4.0, "min": 2.0, "max": 5.0, "spread": 0.75}
    rounds = [{"a": {"cpu": 1.0}, "b": {"cpu": 10.0}}, {"a": {"cpu": 1.1}, "b": {"cpu": 14.0}}, {"a": {"cpu": 1.0}}]
    assert spread_of(rounds) == pytest.approx(4 / 12)
    assert spread_of([{}]) == 0.0


def test_sides_alternate_and_a_quiet_row_is_measured_once():
    run, ran = runner({"ours": [1.0, 1.1, 1.0], "theirs": [4.0, 4.1, 4.0]})
    found = run_row(row(), run)
    assert ran == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (len(found["attempts"]), found["noisy"], found["errors"]) == (1, False, {})
    assert ratio(found, "theirs") == pytest.approx(0.25)
    assert ratio(found, "ours") is None
    assert ratios(found, "theirs") == pytest.approx([0.25, 1.1 / 4.1, 0.25])


def test_a_side_gets_the_number_of_the_round():
    drawn = []

    def run(side):
        drawn.append((side.name, side.arguments))
        return {"cpu": 1.0, "wall": 1.0}

    sides = (Side("ours", "a:b", {"seed": ROUND, "scans": 4}), Side("theirs", "c:d", {"kind": "x"}))
    found = run_row(Row("r", "S", "title", "ms", sides, 10, rounds=2), run)
    first, second = ({"seed": number, "scans": 4} for number in (0, 1))
    assert drawn == [("ours", first), ("theirs", {"kind": "x"}), ("theirs", {"kind": "x"}), ("ours", second)]
    assert found["sides"][0]["arguments"]["seed"] == ROUND


def test_a_noisy_row_is_measured_again_and_the_quieter_attempt_counts():
    run, ran = runner({"ours": [1.0, 2.0, 1.0, 1.1], "theirs": [4.0, 4.0, 4.0, 4.0]})
    found = run_row(row(rounds=2), run)
    assert (len(found["attempts"]), found["chosen"], found["noisy"], len(ran)) == (2, 1, False, 8)
    run, ran = runner({"ours": [1.0, 2.0, 1.0, 3.0], "theirs": [4.0] * 4})
    found = run_row(row(rounds=2), run)
    assert (len(found["attempts"]), found["chosen"], found["noisy"]) == (2, 0, True)


@pytest.mark.parametrize(("metric", "attempts"), [("cpu", 1), ("wall", 2)])
def test_the_noise_of_a_row_is_that_of_the_seconds_that_it_compares(metric, attempts):
    seconds = iter([1.0, 2.0, 1.5, 1.5])

    def run(side):
        return {"cpu": 1.0, "wall": next(seconds) if side.name == "ours" else 4.0}

    found = run_row(row(rounds=2, metric=metric), run)
    assert (len(found["attempts"]), found["chosen"], found["noisy"]) == (attempts, attempts - 1, False)


def test_a_noisy_row_is_not_measured_again_without_repeats_or_time():
    for more, repeat in (({"repeats": 0}, True), ({}, False)):
        run, ran = runner({"ours": [1.0, 2.0], "theirs": [4.0, 4.0]})
        found = run_row(row(rounds=2, **more), run, repeat=lambda repeat=repeat: repeat)
        assert (len(found["attempts"]), found["noisy"], len(ran)) == (1, True, 4)


def test_a_side_that_fails_is_run_no_more_and_its_rounds_do_not_count():
    run, ran = runner({"ours": [1.0] * 3, "theirs": [4.0, "OSError: no"]})
    found = run_row(row(), run)
    assert ran.count("theirs") == 2
    assert found["errors"] == {"theirs": "OSError: no"}
    assert all(list(results) == ["ours"] for results in found["attempts"][0]["rounds"])
    assert ratio(found, "theirs") is None


def test_a_side_with_an_error_known_before_does_not_run():
    run, ran = runner({"ours": [1.0] * 3, "theirs": []})
    assert run_row(row(), run, errors={"theirs": "not installed"})["errors"] == {"theirs": "not installed"}
    assert set(ran) == {"ours"}


def test_a_case_runs_in_a_process_and_its_error_is_its_last_line(tmp_path):
    import sys

    arguments = {"data": str(tmp_path), "scans": 300}
    assert run_case(sys.executable, "peers.reading:write_index", arguments, 1) == {"cpu": 0.0, "wall": 0.0}
    with pytest.raises(CaseFailed, match="^FileExistsError: .*mds-300"):
        run_case(sys.executable, "peers.reading:write_index", arguments, 1)
