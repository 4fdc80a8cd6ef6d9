"""The bias of predictions at each site, and the coverage of readouts at sites that they were not fitted to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from evaluation.statistics.site_bias import site_bias
from tests.pretrain.readouts.world import World, fit


def test_a_table_by_hand():
    table = site_bias(
        true=np.array([30.0, 40.0, 50.0, 60.0, 60.0, 70.0, np.nan]),
        predicted=np.array([34.0, 46.0, 55.0, 58.0, 56.0, 70.0, 3.0]),
        low=np.array([31.0, 41.0, 49.0, 55.0, 55.0, 65.0, 0.0]),
        high=np.array([37.0, 51.0, 61.0, 59.0, 61.0, 75.0, 9.0]),
        sites=np.array(["a", "a", "a", "b", "b", "c", "c"]),
        participants=np.array([1, 2, 3, 4, 4, 5, 6]),
    ).set_index("site")
    assert table["people"].to_dict() == {"a": 3, "b": 1, "c": 1, "all": 5}
    assert table["scans"].to_dict() == {"a": 3, "b": 2, "c": 1, "all": 6}
    assert table["bias"].to_dict() == pytest.approx({"a": 5.0, "b": -3.0, "c": 0.0, "all": 2.4})
    # b: one of the two scans of person 4 is held, which is half a person.
    assert table["coverage"].to_dict() == pytest.approx({"a": 1 / 3, "b": 0.5, "c": 1.0, "all": (1 + 0.5 + 1) / 5})
    # a: biases of the other two people are 5.5, 4.5 and 5; 35.5, 44.5 and 55 lie within the intervals.
    assert table["corrected_coverage"]["a"] == 1.0
    assert np.isnan(table["corrected_coverage"]["b"])
    half = 4.302653 * 1.0 / np.sqrt(3)
    assert table.loc["a", ["bias_low", "bias_high"]].tolist() == pytest.approx([5 - half, 5 + half])


def test_no_true_value_is_an_error():
    with pytest.raises(ValueError, match="no scan has a true value"):
        site_bias(*np.full((4, 3), np.nan), sites=np.arange(3), participants=np.arange(3))


def test_healthy_people_of_new_sites_are_covered_once_the_bias_of_their_site_is_removed():
    """Readouts fitted to 300 people of 12 sites; 25 people at each of 6 other sites; 12 worlds.

    The spread of the sites shifts predictions by several years, so that fewer than 92 % are held before.
    """
    shown = []
    for seed in range(12):
        world = World(seed)
        readout = fit(*world.draw(300, 12, 0.3))
        table, features = world.draw(150, 6, 0.9)
        predicted, (low, high) = readout.predict(features), readout.interval(features)
        found = site_bias(
            table["age"], predicted, low, high, sites=table["site"], participants=table["person"]
        ).set_index("site")
        assert found.loc["all", "people"] == 150
        shown.append(found)
    whole = pd.concat([found.loc[["all"]] for found in shown])
    biases = pd.concat([found.drop("all") for found in shown])["bias"]
    print(
        f"coverage {whole['coverage'].mean():.3f}, corrected {whole['corrected_coverage'].mean():.3f}, bias {biases.std():.1f}"
    )
    assert biases.std() > 3.0
    assert whole["coverage"].mean() < 0.92
    assert 0.92 <= whole["corrected_coverage"].mean() <= 0.98
