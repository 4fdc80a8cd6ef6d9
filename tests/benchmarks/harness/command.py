"""Measure the rows and write the page: `python -m tests.benchmarks`, or `make bench`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import check_output, writable_folder, write_json
from tests.benchmarks.harness import environment, machine, page, roofline
from tests.benchmarks.harness.row import Row, Side
from tests.benchmarks.harness.statistics import median_of
from tests.benchmarks.harness.table import DATA, QUICK, Data, Sizes, data_of, rows_of
from tests.benchmarks.harness.turns import MAX_SPREAD, CaseFailed, Result, run_case, run_row

WHOLE = "python -m tests.benchmarks"  # the command that measures all rows with their peers
NO_PEERS = "none"
NOT_MEASURED = "not measured: --peers none"
RESULT_FILENAME = "performance.json"
SOME = "some_rows"  # name of the result of rows that were named
APART = "performance_*.json"  # results of rows that run only if they are named


@dataclass
class Bench:
    """The state of a run.

    Attributes:
        out: folder of the results.
        sizes: how much each row does.
        peers: interpreter of the peers' environment; None measures without peers.
        until: time.monotonic() after which no row is measured again.
        kept: digest of everything but the row that a kept result depends on.
        failed: prepared data that could not be made, and why.
    """

    out: Path
    sizes: Sizes
    peers: Path | None
    until: float
    kept: str
    failed: dict[str, str] = field(default_factory=dict)

    def run(self, case: str, arguments: Mapping[str, Any], *, peer: bool, threads: int = 1) -> Result:
        """Run a case in the environment that it needs."""
        if peer and self.peers is None:
            raise CaseFailed(NOT_MEASURED)
        python = str(self.peers) if peer else sys.executable
        data = str(self.out / "data")
        placed = json.loads(json.dumps(arguments).replace(DATA, data))
        try:
            return run_case(python, case, placed, threads)
        except CaseFailed as error:  # its text goes onto the page, which names no folder of this machine
            folders = {data: "DATA", str(machine.ROOT): ".", str(Path(python).parents[1]): "ENVIRONMENT"}
            text = str(error)
            for folder, name in folders.items():
                text = text.replace(folder, name)
            raise CaseFailed(text[:300]) from None

    def prepare(self, name: str) -> str:
        """Prepare data unless the same code has done so; return an empty text, or why it cannot be made."""
        stamp = self.out / "data" / f".{name}"
        data: Data = data_of(self.sizes)[name]
        key = hashlib.sha256(f"{self.sizes} {data} {self.kept}".encode()).hexdigest()
        if name in self.failed:
            return self.failed[name]
        if stamp.is_file() and stamp.read_text() == key:
            return ""
        for earlier in data.after:
            if reason := self.prepare(earlier):
                return reason
        for folder in data.folders:
            shutil.rmtree(self.out / "data" / folder, ignore_errors=True)
        (self.out / "data").mkdir(parents=True, exist_ok=True)
        try:
            self.run(data.case, data.arguments, peer=data.peer, threads=os.cpu_count() or 1)
            os.sync()  # the disk is idle again when the first row is measured
        except CaseFailed as error:
            self.failed[name] = str(error)
            return str(error)
        stamp.write_text(key)
        return ""

    def measure(self, row: Row) -> dict[str, Any]:
        """Return the row's result: the kept one, or a new one, which is kept."""
        path, key = self.out / "rows" / f"{row.name}.json", row.fingerprint(self.kept)
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept["key"] == key:
                return kept
        shared = "".join(self.prepare(name) for name in row.needs)
        errors = {}
        for side in row.sides:
            reason = NOT_MEASURED if side.peer and self.peers is None else shared
            reason = reason or "".join(self.prepare(name) for name in side.needs)
            if reason:
                errors[side.name] = reason

        def run(side: Side) -> Result:
            return self.run(side.case, side.arguments, peer=side.peer, threads=row.threads)

        result = run_row(row, run, errors=errors, repeat=lambda: time.monotonic() < self.until)
        if own_failures([result]):  # the disk may have been full: the next run tries again
            path.unlink(missing_ok=True)
            return result
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**result, "key": key})
        return dict(json.loads(path.read_text()))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that every row runs")
    parser.add_argument("--rows", metavar="PATTERNS", help="only these rows, for example 'read*,loss-8192'; see --list")
    parser.add_argument("--list", action="store_true", help="list the rows and how long each takes, and end")
    parser.add_argument(
        "--peers", metavar="FOLDER", help=f"folder of the peers' environment (default: a cache), or {NO_PEERS}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder of data and results; finished rows in it are kept"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=25,
        help=f"measure no row again (spread above {MAX_SPREAD:.0%}%) after this time",
    )
    parser.add_argument("--page", type=Path, metavar="JSON", help="write the page of this result into docs, and end")
    return parser.parse_args(arguments)


def chosen_rows(rows: Sequence[Row], patterns: str | None) -> list[Row]:
    """Return the rows that match a pattern; without patterns, those that are not optional.

    Raises:
        UserError: if a pattern matches no row.
    """
    if patterns is None:
        return [row for row in rows if not row.optional]
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatch(row.name, pattern) for row in rows):
            raise UserError(f"--rows={pattern} matches no row; rows: {', '.join(row.name for row in rows)}")
    return [row for row in rows if any(fnmatch(row.name, pattern) for pattern in wanted)]


def line_of(result: Mapping[str, Any]) -> str:
    """Return what the terminal shows of a row."""
    shown = []
    for side in (side["name"] for side in result["sides"]):
        seconds = median_of(result, side, result["metric"])
        shown.append(f"{side} " + ("failed" if seconds is None else f"{result['scale'] * seconds:.3g}"))
    noise = f", spread {result['attempts'][result['chosen']]['spread']:.0%}" + (
        ", above the limit" if result["noisy"] else ""
    )
    return f"{result['name']:<16} {', '.join(shown)} {result['unit']} ({result['seconds']:.0f} s{noise})"


def run_all(chosen: argparse.Namespace) -> int:
    """Measure the rows; return 1 if one of our own sides failed."""
    sizes = QUICK if chosen.quick else Sizes()
    rows = chosen_rows(rows_of(sizes), chosen.rows)
    if chosen.list:
        for row in rows_of(sizes) if chosen.rows is None else rows:
            named = " (runs only if it is named)" if row.optional else ""
            print(
                f"{row.name:<16}{row.seconds:>6.0f} s  {row.title}: {', '.join(side.name for side in row.sides)}{named}"
            )
        print(f"{'all':<16}{sum(row.seconds for row in rows):>6.0f} s, without preparing data and the peers")
        return 0
    check_output(chosen.out, "--out")
    peers, needed = None, any(side.peer for row in rows for side in row.sides)
    if needed and chosen.peers != NO_PEERS:
        own = writable_folder("bench", programs=True) / "peers" if chosen.peers is None else Path(chosen.peers)
        peers = environment.make(own.absolute())
    about = describe(chosen, peers)
    bench = Bench(chosen.out.absolute(), sizes, peers, time.monotonic() + 60 * chosen.minutes, _kept(about))
    started, load, results = time.time(), os.getloadavg(), []
    for row in rows:
        results.append(bench.measure(row))
        print(line_of(results[-1]), flush=True)
    content = {
        **about, "load": [list(load), list(os.getloadavg())], "started": started,
        # A run that continues has kept rows of the run before.
        "seconds": max(time.time() - started, sum(row["seconds"] for row in results)),
        "data_errors": bench.failed, "rows": results, "roofline": counts_of(results),
    }  # fmt: skip
    name = Path(RESULT_FILENAME).stem if chosen.rows is None else SOME
    write_json(bench.out / f"{name}.json", content)
    page.write(content, bench.out / f"{name}.md", bench.out / "figures")
    print(f"bench: {bench.out / name}.json and {name}.md are written", flush=True)
    failed = report_failures(results)
    if not (failed or chosen.quick or (needed and peers is None)):
        if chosen.rows is None:
            publish(content)
        elif [row.optional for row in rows] == [True]:
            publish_apart(content)
    return failed


def describe(chosen: argparse.Namespace, peers: Path | None) -> dict[str, Any]:
    """Return what the result says about command, code, machine and versions."""
    commit, dirty = machine.commit()
    return {
        "format": 1, "quick": chosen.quick, "command": command_of(chosen), "commit": commit, "dirty": dirty,
        "hardware": machine.hardware(), "versions": machine.versions(),
        "peers": environment.versions(peers) if peers else {},
    }  # fmt: skip


def _kept(about: Mapping[str, Any]) -> str:
    """Return what a kept result depends on beside its row: code, machine and versions, but not the clock of the moment."""
    hardware = {**about["hardware"], "mhz": 0}
    facts = [hardware, *(about[name] for name in ("quick", "commit", "versions", "peers")), machine.difference()]
    return json.dumps(facts, sort_keys=True)


def counts_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return operations and bytes of the recipe's stages, if they were measured."""
    if not any(row["name"] == "stages" for row in results):
        return None
    stored = next((median_of(row, "ours", "bytes") for row in results if row["name"] == "read"), None)
    return roofline.counts(stored=stored or 1e6)


def command_of(chosen: argparse.Namespace) -> str:
    """Return the command line without the folders of this machine."""
    rows = [f"--rows '{chosen.rows}'"] if chosen.rows else []
    peers = ["--peers none"] if chosen.peers == NO_PEERS else []
    return " ".join([WHOLE, *rows, *peers, *["--quick"] * chosen.quick])


def own_failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each of our sides that failed."""
    own = {(row["name"], side["name"]) for row in results for side in row["sides"] if not side["peer"]}
    return [f"{row['name']}, {name}: {text}" for row in results for name, text in row["errors"].items()
            if (row["name"], name) in own]  # fmt: skip


def report_failures(results: Sequence[Mapping[str, Any]]) -> int:
    """Name our sides that failed; return 1 if there are some."""
    failed = own_failures(results)
    for line in failed:
        print(f"bench: error: {line}", file=sys.stderr)
    return 1 if failed else 0


def publish(content: Mapping[str, Any], docs: Path = machine.ROOT / "docs") -> None:
    """Write the page, its figures and the result below docs; the page also shows the results of rows measured apart.

    Raises:
        UserError: if the result lacks rows or peers.
    """
    if content["command"] != WHOLE:
        raise UserError(f"the result is that of `{content['command']}`; docs/performance.md shows that of `{WHOLE}`")
    result = docs / "benchmarks" / RESULT_FILENAME
    write_json(result, dict(content))
    # From the file, which has an order of its own: so the page can be made again from it.
    page.write(json.loads(result.read_text()), docs / "performance.md", docs / "figures", apart_in(docs))
    print("bench: docs/performance.md is written", flush=True)


def publish_apart(content: Mapping[str, Any], docs: Path = machine.ROOT / "docs") -> None:
    """Write the result of one row that ``make bench`` leaves out below docs, and the page with it."""
    folder, name = docs / "benchmarks", content["rows"][0]["name"]
    write_json(folder / APART.replace("*", name), dict(content))
    if (folder / RESULT_FILENAME).is_file():
        publish(json.loads((folder / RESULT_FILENAME).read_text()), docs)


def apart_in(docs: Path) -> list[dict[str, Any]]:
    """Return the results below docs of the rows that ``make bench`` leaves out."""
    return [json.loads(path.read_text()) for path in sorted((docs / "benchmarks").glob(APART))]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    chosen = parse(arguments)
    try:
        if chosen.page is not None:
            publish(json.loads(chosen.page.read_text()))
            return 0
        return run_all(chosen)
    except UserError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
