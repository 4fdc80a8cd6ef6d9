"""The page holds what a made-up result holds: medians, ratios, errors, marks, figures and the roofline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infra.errors import UserError
from pretrain.config import load_recipe
from pretrain.forecast.operations import plain_model, scan_flops
from tests.benchmarks.harness import page, roofline
from tests.benchmarks.harness.command import RESULT_FILENAME, apart_in, publish, publish_apart
from tests.benchmarks.harness.statistics import median_of, ratio
from tests.benchmarks.harness.table import Sizes, rows_of

DOCS = Path(__file__).resolve().parents[3] / "docs"
COMMITTED = DOCS / "benchmarks" / RESULT_FILENAME
COUNT = {
    "read": {"flops": 0.0, "bytes": 5e6}, "augmentation": {"flops": 1e7, "bytes": 2e7},
    "transfer": {"flops": 0.0, "bytes": 1e7}, "network": {"flops": 5e11, "bytes": 2e10},
    "loss": {"flops": 2e5, "bytes": 3e3}, "exchange": {"flops": 2e5, "bytes": 7e5},
}  # fmt: skip


def measured(row, values, **errors):
    """A row's result with ``values`` (side -> CPU seconds of each round); the wall clock is twice as long."""
    names = [side.name for side in row.sides if side.name not in errors]
    rounds = [
        {
            name: {"cpu": cpu, "wall": 2 * cpu, "peak": 2**20 * 59, "rate": 1e10}
            for name, cpu in zip(names, of, strict=True)
        }
        for of in zip(*(values[name] for name in names), strict=True)
    ]
    attempt = {"load": [0.1, 0.2], "spread": 0.1, "rounds": rounds}
    return {
        **row.description(), "attempts": [attempt], "chosen": 0, "noisy": False, "errors": errors, "seconds": 1.0, "key": "k",
    }  # fmt: skip


@pytest.fixture
def content():
    rows = {row.name: row for row in rows_of(Sizes())}
    results = [
        measured(rows["loss-8192"], {"ours": [0.5, 0.56, 0.6], "nidl": [7.0, 7.6, 7.7]}),
        measured(rows["loss-65536"], {"ours": [20.0, 21.0, 22.0]}, nidl="MemoryError: 32 GiB | <no>"),
        measured(rows["weak-1"], {"ours": [0.1] * 3, "torch DDP": [0.1] * 3}),
        {**measured(rows["weak-2"], {"ours": [0.2] * 3, "torch DDP": [0.4] * 3}), "noisy": True},
        measured(rows["stages"], {side.name: [0.01, 0.01, 0.01] for side in rows["stages"].sides}),
    ]
    hardware = {
        "processor": "P 7", "cores": 2, "mhz": 2500.0, "vectors": "avx2", "flops_per_cycle": 32, "memory_bytes": 2**34,
        "system": "Linux 6",
    }  # fmt: skip
    return json.loads(json.dumps({
        "format": 1, "quick": False, "command": "python -m tests.benchmarks", "commit": "0123456789abcdef", "dirty": "false",
        "hardware": hardware, "versions": {"torch": "2.13.0"}, "peers": {"nidl": "0.0.2"}, "load": [[0.1] * 3, [0.2] * 3],
        "started": 0.0, "seconds": 120.0, "data_errors": {}, "rows": results, "roofline": COUNT,
    }))  # fmt: skip


def test_the_tables_hold_medians_ranges_ratios_and_errors(content):
    text = page.text_of(content)
    assert "| **ours** | 560 ms | 500 to 600 | 1,120 |  | 59 MiB |" in text
    assert "| nidl | 7,600 ms | 7,000 to 7,700 | 15,200 | 0.07 | 59 MiB |" in text
    assert "| nidl | - | - | - | - | MemoryError: 32 GiB \\| &lt;no> |" in text
    assert "2 ranks, CPU time of all ranks \\* |" in text
    assert "1 rank, CPU time of all ranks |" in text
    assert (
        "1970-01-01 with 2 cores of P 7, 16 GiB, Linux 6; load average 0.1 at the start and 0.2 at the end; commit 0123456789;"
        in text
    )
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_numbers_have_three_digits_and_no_exponent():
    numbers = [0, 0.0000123456, 0.00296, 0.3, 1.0, 9.999, 99.94, 99.96, 101.4, 31_049.6]
    shown = ["0", "0.0000123", "0.00296", "0.300", "1.00", "10.0", "99.9", "100", "101", "31,050"]
    assert [page._digits(number) for number in numbers] == shown


def test_small_sizes_are_said_to_say_nothing(content):
    assert "say nothing about speed" not in page.text_of(content)
    assert "say nothing about speed" in page.text_of({**content, "quick": True})


def test_the_roofline_compares_the_measured_time_with_the_larger_of_two_limits(content):
    # 2 x 2.5 GHz x 32 = 160 GFLOP/s: 5e11 operations take 3.125 s, 2e10 bytes at 1e10 a second take 2 s. 0.02 s were measured.
    text = page.text_of(content)
    assert "= 160 GFLOP/s" in text
    assert (
        "| network | 500 | 2e+04 | 3.12e+03 (arithmetic) | 20 (20 to 20) | 15625% | 5.97 |" in text
    )  # H100: 2e10 bytes / 3.35e12
    assert "| read | 0 | 5 | 0.5 (bytes) | - | - | host |" in text  # the row was not measured
    assert "| transfer | 0 | 10 | 2 (bytes) | 20 (20 to 20) | 10% | 0.156 |" in text  # here a copy reads and writes
    # A product of matrices has 1e10 operations a second here: the operations would take 50 s, the bytes 2 s.
    assert "would take 50.00 s, and its bytes alone take 2.00 s, of 0.02 s" in text
    assert "It is faster than such a product: arithmetic is the limit, at 15625% of the peak." in text
    for rounds in next(row for row in content["rows"] if row["name"] == "stages")["attempts"][0]["rounds"]:
        rounds["network"]["wall"] = 60.0
    assert "of 60.00 s\nmeasured. Arithmetic is the limit, in convolutions" in page.text_of(content)


def test_the_page_and_its_figures_are_written(content, tmp_path):
    page.write(content, tmp_path / "performance.md", tmp_path / "figures")
    text = (tmp_path / "performance.md").read_text()
    images = re.findall(r"!\[[^]]*\]\((figures/[^)]+)\)", text)
    assert images == [f"figures/performance_{name}.png" for name in ("ratios", "loss", "ranks")]
    assert all((tmp_path / image).stat().st_size < 100_000 for image in images)


def test_a_page_without_results_has_no_tables():
    assert "|---" not in page.placeholder()
    assert page.EMPTY in page.placeholder()


def test_the_costs_of_reading_in_docs_data_are_those_of_the_committed_result():
    result = json.loads(COMMITTED.read_text())
    row = {row["name"]: row for row in result["rows"]}

    def ms(name, side="ours", field="cpu"):
        return f"{1e3 * median_of(row[name], side, field):.2f} ms"

    checksum = f"of which {ms('read-raw', field='part_checksum')} is the checksum"
    text = (DOCS / "data.md").read_text()
    for line in (
        f"| zstd (the default) | 1.18 MB | {ms('read')} | {ms('read-cold', field='wall')} |",
        f"| `--codec npy` | 4.25 MB | {ms('read-raw-shards')} | |",
        f"| `data.cache_unpacked` | 1.18 + 4.25 MB | {ms('read-raw')}, {checksum} | {ms('read-raw-cold', field='wall')} |",
        f"| read, verify and unpack | {ms('read')} a scan;",
        f"| two views with preset `default` | {1e3 * median_of(row['views'], 'ours', 'cpu'):.0f} ms a view;",
    ):
        assert line in text


def test_the_committed_page_is_that_of_the_committed_result():
    text = (DOCS / "performance.md").read_text()
    if not COMMITTED.exists():
        assert text == page.placeholder()
        return
    images = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text)
    assert all((DOCS / image).is_file() for _, image in images)
    shown = [(title, Path(image)) for title, image in images]
    assert text == page.text_of(json.loads(COMMITTED.read_text()), shown, apart_in(DOCS))


def test_a_row_that_runs_only_if_it_is_named_joins_the_page(content, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / RESULT_FILENAME).write_text(json.dumps(content))
    (row,) = [row for row in rows_of(Sizes()) if row.name == "search-large"]
    command = "python -m tests.benchmarks --rows 'search-large'"
    result = measured(row, {"ours": [12.0], "scikit-learn": [10.0]})
    for seconds in (1.0, 1500.0):  # the second takes the place of the first
        publish_apart({**content, "rows": [result], "command": command, "seconds": seconds}, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert text.count("## Measured apart") == 1
    assert f"`{command}`, 25 minutes." in text
    assert "| nested tuned probe, 10,000 x 2,560 | **ours** | 12.0 s |" in text
    assert "- nested tuned probe, 10,000 x 2,560, beside scikit-learn (1.20): " in text
    assert (tmp_path / "figures").is_dir()


def test_every_committed_row_in_which_another_is_cheaper_has_its_reason():
    results = [json.loads(COMMITTED.read_text()), *apart_in(DOCS)]
    rows = [row for result in results for row in result["rows"] if row["section"] != "Roofline"]
    above = [
        row for row in rows for side in row["sides"][1:]
        if not side["name"].startswith("ours") and (ratio(row, side["name"]) or 0) >= page.EQUAL
    ]  # fmt: skip
    lines = list(page.cheaper(rows))
    for row in above:
        (line,) = [line for line in lines if f"{row['title']}, beside" in line and "In some rounds" not in line]
        assert line.endswith(page.reason(row["name"]))
        assert "not explained" not in line
    sure = [line for line in lines if not line.startswith("- In some rounds")]
    assert all(" (0." not in line and " (1.00)" not in line for line in sure)
    rest = list(page.cheaper([row for row in rows if row not in above]))
    assert all(line in ("", "## Where others are cheaper") or line.startswith("- In some rounds") for line in rest)


@pytest.mark.parametrize("more", ["--rows 'read'", "--peers none", "--quick"])
def test_a_result_without_all_rows_and_peers_does_not_become_the_page(content, tmp_path, more):
    with pytest.raises(
        UserError, match=f"^the result is that of `python -m tests.benchmarks {more}`; docs/performance"
    ):
        publish({**content, "command": f"python -m tests.benchmarks {more}"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_channels_last_saves_in_docs_encoders_is_that_of_the_committed_result():
    (row,) = [row for row in json.loads(COMMITTED.read_text())["rows"] if row["name"] == "step"]
    share = median_of(row, "bare torch", "cpu") / median_of(row, "bare, torch's layout", "cpu")
    assert f"in a plain torch loop takes {share:.2f} of the time" in (DOCS / "encoders.md").read_text()


def test_the_cost_of_densenet_in_docs_encoders_is_that_of_the_roofline():
    (row,) = [row for row in json.loads(COMMITTED.read_text())["rows"] if row["name"] == "stages"]
    cells = next(
        line for line in (DOCS / "encoders.md").read_text().splitlines() if line.startswith("| `densenet121` | 11")
    )
    for cell, field in zip(cells.split("|")[5:7], ("wall", "cpu"), strict=True):
        assert float(cell) == pytest.approx(median_of(row, "network", field), rel=0.25)  # measured at another time


def test_a_row_that_is_cheaper_in_some_rounds_only_is_named_with_their_range():
    (row,) = [row for row in rows_of(Sizes()) if row.name == "loader"]
    lines = list(page.cheaper([measured(row, {"ours": [1.0, 1.0, 1.2], "nidl": [1.1, 1.1, 1.0]})]))
    assert lines[2] == f"- In some rounds, but not in the median: {row.title}, beside nidl (0.91 to 1.20)."
    assert list(page.cheaper([measured(row, {"ours": [1.0, 1.0, 1.0], "nidl": [1.1, 1.1, 1.0]})])) == []


@pytest.mark.jobs
def test_operations_and_bytes_follow_from_the_recipe():
    grid, recipe = (33, 33, 33), load_recipe(roofline.RECIPE, [])
    count = roofline.counts(grid, stored=1000.0)
    model = plain_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    assert count["network"]["flops"] == scan_flops(model, grid)
    # The least that an unfused pass moves: every weight read twice and its gradient written.
    assert count["network"]["bytes"] > 12 * parameters
    assert count["read"]["bytes"] == 1000 + 2 * 33**3
    # 2 x 64 rows: three products of (128, 128) by 128 numbers, two operations each, shared by 64 scans.
    assert count["loss"]["flops"] == 3 * 2 * 128 * 128 * 128 / 64
    assert count["exchange"]["bytes"] == 4 * parameters / 64  # half of the ring's two passes, on two ranks
