"""The complete blocks of repeats that are found in a table of scans, and one line for what cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_pipeline.storage.manifest import Manifest
from evaluation.retest.design import design_of
from infra.errors import UserError


def shards(rows):
    """A manifest with the scans (person, site, session, age)."""
    table = pd.DataFrame(rows, columns=["participant_id", "site", "session", "age"])
    table["dataset"] = "d"
    table["key"] = "d_sub-" + table["participant_id"] + "_ses-" + table["session"]
    content = {"digest": "", "grid": {}, "settings": {}, "shards": [], "scans": {"name": "scans.parquet"}}
    return Manifest(Path("shards"), content, table)


def travelling(people=6, sites="abc", repeats=2):
    return [(f"p{n}", site, f"{site}{r}", 30.0 + n) for n in range(people) for site in sites for r in range(repeats)]


def test_travelling_heads_give_a_block_for_each_repeat_and_for_each_scanner():
    manifest = shards([*travelling(), ("alone", "a", "1", 50.0)])
    design = design_of(manifest)
    assert len(design.rows) == 36
    assert "alone" not in set(manifest.scans["participant_id"].iloc[design.rows])
    assert [block.scans.shape for block in design.blocks["scanners"]] == [(6, 3), (6, 3)]
    assert [block.scans.shape for block in design.blocks["repeats"]] == [(6, 2)] * 3
    for block in design.blocks["scanners"]:
        rows = design.rows[block.scans]
        assert (manifest.scans["site"].to_numpy()[rows] == np.array(["a", "b", "c"])).all()
        assert len({tuple(each) for each in manifest.scans["participant_id"].to_numpy()[rows]}) == 6
        assert (design.people[block.scans] == block.people[:, None]).all()
    assert set(design.crossed) == set(range(36))
    assert design.notes == []
    assert design.describe() == (
        "36 scans of 6 people who were scanned more than once, 6 of them with 3 scanners, 6 of them with repeats on one scanner"
    )


def test_people_and_scanners_that_are_not_complete_are_left_out_and_named():
    rows = [row for row in travelling(people=8) if row[:2] != ("p7", "c")]
    rows += [("p0", "rare", "r0", 30.0)]
    design = design_of(shards(rows))
    assert [block.scans.shape for block in design.blocks["scanners"]] == [(7, 3), (7, 3)]
    assert [block.scans.shape[0] for block in design.blocks["repeats"]] == [8, 8, 7]
    assert design.notes == [
        "between scanners: 7 of 8 people with several scanners have all of the 3 that are compared (a, b, c)"
    ]


def test_two_scanners_are_compared_if_people_share_no_more():
    rows = [(f"p{n}", site, site, 40.0) for n in range(6) for site in ("a", "b")]
    rows += [(f"q{n}", site, site, 40.0) for n in range(7) for site in ("c", f"own{n}")]
    design = design_of(shards(rows))
    assert [block.scans.shape for block in design.blocks["scanners"]] == [(6, 2)]
    assert "repeats" not in design.blocks


def test_scanners_are_dropped_until_enough_people_have_all_of_them():
    """An incomplete design: 30 people on two of three scanners each, ten on every pair."""
    pairs = ("ab", "bc", "ac")
    design = design_of(shards([(f"p{n}", site, site, 40.0) for n in range(30) for site in pairs[n % 3]]))
    assert [block.scans.shape for block in design.blocks["scanners"]] == [(10, 2)]
    assert design.notes == [
        "between scanners: 10 of 30 people with several scanners have all of the 2 that are compared (a, b)"
    ]
    rows = [(f"p{n}", site, site, 40.0) for n in range(8) for site in ("abc" + "d" * (n < 4))]  # all four: 4 people
    design = design_of(shards(rows))
    assert [block.scans.shape for block in design.blocks["scanners"]] == [(8, 3)]


def test_the_pair_that_most_people_share_is_taken_if_dropping_does_not_help():
    sites = ["ab", "ab", "ab", "bc", "bc", "bc", "bc", "bc", "ac", "ac", "ac", "ac"]  # 7, 8 and 9 people
    rows = [(f"p{n}", site, site, 40.0) for n, pair in enumerate(sites) for site in pair]
    rows += [(f"q{n}", site, site, 40.0) for n in range(4) for site in "ad"]
    design = design_of(shards(rows))
    (block,) = design.blocks["scanners"]
    assert sorted({design.scanner_names[code] for code in design.scanners[block.scans].ravel()}) == ["b", "c"]


def test_repeats_on_one_scanner_are_ordered_by_age_and_cut_to_what_half_of_the_people_have():
    rows = [
        (f"p{n}", "a", name, 30.0 + years) for n in range(6) for name, years in (("x", 2.0), ("y", 0.0), ("z", 1.0))
    ]
    rows += [(f"p{n}", "a", "w", 40.0) for n in range(2)]
    design = design_of(shards(rows))
    (block,) = design.blocks["repeats"]
    assert block.scans.shape == (6, 3)
    assert (design.ages[block.scans] == [30.0, 31.0, 32.0]).all()
    assert "scanners" not in design.blocks


def test_a_query_selects_scans_and_another_column_tells_scanners_apart():
    manifest = shards(travelling())
    assert design_of(manifest, query="site != 'c'").blocks["scanners"][0].scans.shape == (6, 2)
    manifest.scans["device"] = ["one", "two"] * 18
    assert design_of(manifest, scanner="device").scanner_names == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "change", "text"),
    [
        ({"scanner": "sight"}, {}, r"scanner='sight' is not a column of the shards \(did you mean 'site'\?\)"),
        ({"query": "nothing > 3"}, {}, "query 'nothing > 3' fails on scans.parquet: "),
        (
            {},
            {"site": ""},
            r"scanner=site: 36 of 36 scans of repeatedly scanned people have no site \(such as d_sub-p0_ses-a0\)",
        ),
        (
            {"query": "age < 33"},
            {},
            "3 people of these shards were scanned more than once; reliability needs at least 5",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(options, change, text):
    manifest = shards(travelling())
    for column, value in change.items():
        manifest.scans[column] = value
    with pytest.raises(UserError, match=text):
        design_of(manifest, **options)


def test_repeats_without_complete_blocks_are_one_line():
    rows = [(f"p{n}", site, site, 40.0) for n in range(6) for site in (f"s{n}", f"t{n}")]
    with pytest.raises(UserError, match="no 5 people were scanned on the same two scanners, or twice on the same one"):
        design_of(shards(rows))
