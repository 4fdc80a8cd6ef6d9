"""Write the page of a result: tables, ratios, figures and the roofline, all from the JSON content."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from infra.files import atomic_write
from tests.benchmarks.harness import figures, roofline
from tests.benchmarks.harness.statistics import chosen, median_of, ratio, ratios, summary, values_of

MIB = 2**20
# Beginnings of the names of CPU seconds that are parts of a side's, or were measured apart for comparison.
PART, BESIDE = "part_", "beside_"
COMMAND = "make bench"
EQUAL = 1.005  # lower ratios are shown as 1.00
_ZERO = (
    "ZeRO copies gradients into one block during the backward pass and weights in the update, and our step measures norms "
    "and checks for errors; the rows show the parts of a step."
)
_COMMAND = (
    "nidl writes neither a checkpoint nor records. MLflow's store alone, which the rows show, takes longer than the "
    "difference."
)
# By the beginning of a row's name: why another program can be cheaper.
REASONS = {
    "read-raw": "they check nothing; the rows show what our checksum costs. Raw shards are read in pieces, which is faster "
    "from a disk, and their headers are checked.",
    "open-": "streaming reads an index that has no table of the scans. pandas reads our table, but no manifest.json, and "
    "neither computes the SHA-256 of the files nor checks any row; the rows show what these cost.",
    "step": _ZERO,
    "weak-": _ZERO,
    "command": _COMMAND,
    "pretrain-0": _COMMAND,
    "embed-further": "the bare loops check no scan, and read one after another. Ours reads the next scans while the network "
    "computes, which saves time with slow disks and small networks; here each costs the other some CPU time: the row shows "
    "what they take one after another.",
}
HEAD = f"""# Performance

`{COMMAND}` measures this project beside the programs that do the same work, on the CPUs of one machine, and writes this
page from its result. Times depend on the machine; ratios less so.
"""
METHOD = """## How it is measured

Every case is a new process that prints its result: CPU seconds, wall-clock seconds, and memory and bytes where they
matter. In each round every program of a row runs once, and the order is reversed from round to round, so that other
load meets all of them. The table shows the median of the rounds, and the range of what is compared: CPU seconds, or
wall-clock seconds where the row says so. A row in which these vary by more than 15 % of the median in any of its
programs is measured again, and marked with \\* if they still do. The two largest losses, training end to end, the
roofline, views, cold reads and what is measured apart are not measured again. *Ours / theirs* below 1 means that we are
cheaper; a ratio of wall-clock seconds follows that of CPU seconds if the two differ by more than 2 %. Reading, opening,
augmentation, losses, ranks, start and search have one thread for each process; steps, whole commands, training end to
end and most stages of the roofline have two. *Of this* are parts of the CPU time of a row; *alone* are costs of pieces
of the same work that were measured apart: they are no parts of the row, and processes hold the start of Python. The
scans of training end to end are small, and always in the page cache. What is read from the page cache was brought there
by an earlier pass of the same program. Before a table is opened, the process uses and frees more memory than that
needs: the host of a virtual machine takes back memory that is free for two seconds, and the next use of it would cost
one program or another up to a second.

The others are installed into an environment of their own, with the versions of `tests/benchmarks/peers.txt` and the
same torch, NumPy, SciPy and scikit-learn. Its torchvision is an empty package: the wheel of torchvision does not load
beside torch for CPUs, and no row needs it. MONAI and nidl start faster with it than with the whole one. Reading with
nibabel and NumPy, pandas, the bare script of plan, bare torch, DistributedDataParallel and scikit-learn run in our
environment. Losses may use 80 % of the free memory; where a program fails, the table shows its own error.

    make bench                                                            # all rows, about 40 minutes on two idle cores
    python -m tests.benchmarks --rows 'read*,loss-*' --peers none         # some rows, without the others
    python -m tests.benchmarks --list                                     # the rows and how long each takes
    python -m tests.benchmarks --rows search-large                        # runs only if it is named (a quarter of an hour)

Finished rows are kept in the folder of the results (`--out`, by default `bench`), so that a run that was cut off
continues. They are measured again if the code, the versions or the machine have changed.
"""
EMPTY = f"No result is here yet: `{COMMAND}` on idle cores replaces this page by its tables and figures.\n"


def write(content: Mapping[str, Any], path: Path, images: Path, apart: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the page to ``path`` and its figures into the folder ``images`` beside or above it.

    ``apart`` holds the results of runs of their own: rows that ``make bench`` leaves out because they take long.
    """
    drawn = figures.draw({**content, "rows": [row for result in (content, *apart) for row in result["rows"]]}, images)
    folder = Path("figures") if images.name == "figures" else images
    with atomic_write(path, "w") as stream:
        stream.write(text_of(content, [(title, folder / name) for title, name in drawn], apart))


def text_of(
    content: Mapping[str, Any], images: Sequence[tuple[str, Path]] = (), apart: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the page as Markdown."""
    lines = [HEAD, *_machine(content)]
    for title, image in images[:1]:
        lines += [f"![{title}]({image})", ""]
    sections = dict.fromkeys(row["section"] for row in content["rows"] if row["section"] != "Roofline")
    for section in sections:
        lines += [f"## {section}", "", *_table([row for row in content["rows"] if row["section"] == section]), ""]
        lines += [f"![{title}]({image})\n" for title, image in images[1:] if title.startswith(section)]
    lines += ["## Measured apart", ""] if apart else []
    for other in apart:
        same = other["versions"] == content["versions"] and other["peers"] in ({}, content["peers"])
        lines += [*(_measured(other) if same else _machine(other)), *_table(other["rows"]), ""]
    rows = [row for result in (content, *apart) for row in result["rows"]]
    lines += [*cheaper(rows), *roofline.section(content), METHOD]
    return "\n".join(lines).rstrip() + "\n"


def reason(name: str) -> str:
    """Return why another program can be cheaper in the row of a name."""
    found = (text for beginning, text in REASONS.items() if name.startswith(beginning))
    return next(found, "not explained yet.")


def cheaper(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines about rows in which others are cheaper: for each reason the rows and the ratios.

    Rows in which ours was cheaper in the median, but not in every round, are named last with the range of the rounds.
    """
    by_reason: dict[str, list[str]] = {}
    undecided = []
    for row in rows:
        if row["section"] == "Roofline":
            continue
        peers = [side["name"] for side in row["sides"][1:] if not side["name"].startswith("ours")]
        above = [f"{name} ({value:.2f})" for name in peers if (value := ratio(row, name)) and value >= EQUAL]
        if above:
            by_reason.setdefault(reason(row["name"]), []).append(f"{row['title']}, beside {', '.join(above)}")
        for name in peers:
            each = ratios(row, name)
            if each and (ratio(row, name) or 0) < EQUAL <= max(each):
                undecided.append(f"{row['title']}, beside {name} ({min(each):.2f} to {max(each):.2f})")
    if by_reason or undecided:
        yield from ("## Where others are cheaper", "")
        yield from (f"- {'; '.join(found)}: {text}" for text, found in by_reason.items())
        if undecided:
            yield f"- In some rounds, but not in the median: {'; '.join(undecided)}."
        yield ""


def placeholder() -> str:
    """Return the page before the first result."""
    return f"{HEAD}\n{EMPTY}\n{METHOD}".rstrip() + "\n"


def _measured(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield when, where, with which commit and by which command."""
    hardware, load = content["hardware"], content["load"]
    date = time.strftime("%Y-%m-%d", time.gmtime(content["started"]))
    changed = ", with changes that are not committed" if content["dirty"] == "true" else ""
    yield (
        f"Measured on {date} with {content['hardware']['cores']} cores of {hardware['processor']}, "
        f"{hardware['memory_bytes'] / 2**30:.0f} GiB, {hardware['system']}; load average {load[0][0]:.1f} at the start and "
        f"{load[1][0]:.1f} at the end; commit {content['commit'][:10]}{changed}; `{content['command']}`, "
        f"{content['seconds'] / 60:.0f} minutes."
    )
    yield ""


def _machine(content: Mapping[str, Any]) -> Iterator[str]:
    yield from _measured(content)
    for whose, versions in (("Ours", content["versions"]), ("The others", content["peers"])):
        if versions:
            yield f"{whose}: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
            yield ""
    if content["quick"]:
        yield "**Small sizes (`--quick`): these figures say nothing about speed.**"
        yield ""


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| | | CPU time | range | wall clock | ours / theirs | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        for number, side in enumerate(row["sides"]):
            title = row["title"] + (" \\*" if row["noisy"] else "") + (f". {row['note']}" if row["note"] else "")
            yield "| " + " | ".join([title if number == 0 else "", *_cells(row, side)]) + " |"


def _cells(row: Mapping[str, Any], side: Mapping[str, Any]) -> list[str]:
    name, scale = side["name"], row["scale"]
    shown = f"**{name}**" if name == "ours" else name
    if name in row["errors"]:
        return [shown, "-", "-", "-", "-", "; ".join(filter(None, [_escaped(row["errors"][name]), side["note"]]))]
    cpu = summary([scale * value for value in values_of(row, name, "cpu")])
    wall = scale * (median_of(row, name, "wall") or 0.0)
    varied = summary([scale * value for value in values_of(row, name, row["metric"])])
    unit = " (wall)" if row["metric"] == "wall" else ""
    share = ratio(row, name)
    compared = "" if share is None else f"{share:.2f}{unit}{_wall_ratio(row, name, share)}"
    return [
        shown, f"{_digits(cpu['median'])} {row['unit']}", f"{_digits(varied['min'])} to {_digits(varied['max'])}{unit}",
        _digits(wall), compared, "; ".join(filter(None, [side["note"], *_more(row, name)])),
    ]  # fmt: skip


def _wall_ratio(row: Mapping[str, Any], name: str, share: float) -> str:
    """Return ours / theirs by the wall clock, if that differs from the ratio of CPU seconds by more than 2 %."""
    ours, theirs = (median_of(row, side, "wall") for side in (row["sides"][0]["name"], name))
    if row["metric"] != "cpu" or not ours or not theirs or abs(ours / theirs / share - 1) <= 0.02:
        return ""
    return f", {ours / theirs:.2f} (wall)"


def _digits(number: float) -> str:
    """Return a positive number with three digits, or as a whole number, never with an exponent of ten."""
    if number >= 99.95:
        return f"{number:,.0f}"
    return format(Decimal(f"{number:.2e}"), "f") if number else "0"


def _more(row: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield what else was measured: parts of the time, memory, bytes, scans per second, the start."""
    for begins, label in ((PART, "of this"), (BESIDE, "alone")):
        keys = dict.fromkeys(key for found in chosen(row) for key in found.get(name, {}) if key.startswith(begins))
        costs = {key.removeprefix(begins): row["scale"] * (median_of(row, name, key) or 0.0) for key in keys}
        if costs:
            yield f"{label}: " + ", ".join(f"{part} {_digits(cost)} {row['unit']}" for part, cost in costs.items())
    if peak := median_of(row, name, "peak"):
        yield f"{peak / MIB:,.0f} MiB"
    if stored := median_of(row, name, "bytes"):
        yield f"{stored / 1e6:.2f} MB a scan"
    if values_of(row, name, "fetched"):
        yield f"{(median_of(row, name, 'fetched') or 0) / 1e6:.2f} MB from the disk"
    start, used = median_of(row, name, "start"), median_of(row, name, "start_cpu")
    if start and used:
        wall = median_of(row, name, "wall")
        rate = f"{1 / wall:.2f} scans/s; " if wall and row["section"] == "Training" else ""
        yield f"{rate}start {start:.1f} s, {used:.1f} CPU s"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
