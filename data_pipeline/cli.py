"""The commands ``yaware cohort`` and ``yaware shards``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from data_pipeline.cli_arguments import (
    add_annotate_arguments,
    add_append_arguments,
    add_build_arguments,
    add_index_arguments,
    add_layout_arguments,
    add_reading_arguments,
    layout_options,
    parse_with_quality,
    reading_options,
)
from infra.errors import UserError
from infra.files import check_output
from infra.slurm.batch_script import CheckedCommand, JobSize


def cohort(arguments: list[str]) -> int:
    """Run ``yaware cohort``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="yaware cohort", description="Simulate, prepare or inspect a cohort of scans."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    simulate = commands.add_parser("simulate", help="write a simulated cohort as a BIDS folder of NIfTI files")
    prepare = commands.add_parser(
        "prepare", help="bring raw T1-weighted scans to the template: brain extraction, registration, grey matter"
    )
    inspect = commands.add_parser(
        "inspect", help="write tables and an HTML page: participants, scans, and which scans a build excludes"
    )
    add_reading_arguments(inspect)
    inspect.add_argument(
        "--out", type=Path, help="folder for the page (default: inspect-<data set> in the current folder)"
    )
    if arguments[:1] == ["simulate"]:  # imported only if needed, because the import is slow
        from data_pipeline.simulation.cli import add_simulate_arguments, run_simulate

        add_simulate_arguments(simulate)
        return run_simulate(parser.parse_args(arguments))
    if arguments[:1] == ["prepare"]:
        from data_pipeline.prepare.cli import add_prepare_arguments, run_prepare

        add_prepare_arguments(prepare)
        return run_prepare(*parser.parse_known_args(arguments))
    return _inspect(parse_with_quality(parser, arguments))


def shards(arguments: list[str]) -> int:
    """Run ``yaware shards``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="yaware shards", description="Build, extend, describe, preview and verify WebDataset shards of a cohort."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_build_arguments(commands.add_parser("build", help="build shards and their manifest from a cohort"))
    add_index_arguments(
        commands.add_parser(
            "index", help="write a manifest for WebDataset shards of other tools, which are not changed"
        )
    )
    preview = commands.add_parser("preview", help="draw some scans and two augmented views of each")
    preview.add_argument("shards", help="folder or URL of shards")
    preview.add_argument(
        "--out", type=Path, help="PNG file to write (default: preview.png in the folder of the shards)"
    )
    preview.add_argument(
        "--augmentation", default="default", help="preset: none, default, t1w, paper-all, paper-cutout"
    )
    preview.add_argument("--scans", type=int, default=4, help="number of scans (default 4)")
    add_append_arguments(commands.add_parser("append", help="add a data set or new scans to shards"))
    add_annotate_arguments(
        commands.add_parser(
            "annotate", help="add columns of a table, or licences of data sets, to the manifest of shards"
        )
    )
    info = commands.add_parser("info", help="print counts, ages, sites, splits and sizes")
    info.add_argument("shards", help="folder or URL of shards")
    info.add_argument("--json", action="store_true", help="print JSON")
    verify = commands.add_parser("verify", help="compare every byte with its checksum")
    verify.add_argument("shards", help="folder or URL of shards")
    verify.add_argument("--repair", metavar="COHORT", help="rebuild damaged and missing shards from this cohort")
    add_layout_arguments(verify)
    verify.add_argument("--workers", type=int, help="threads, and Ray workers for --repair (default: every core)")
    options = parse_with_quality(parser, arguments)
    return RUN[options.command](options)


def _inspect(options: argparse.Namespace) -> int:
    from data_pipeline.quality.inspect import inspect_cohort

    page = inspect_cohort(options.cohort, options.out, **reading_options(options))
    print(f"cohort: wrote {page} and {page.parent / 'quarantine.tsv'}")
    return 0


def _index(options: argparse.Namespace) -> int:
    from data_pipeline.cohort.split import parse_splits
    from data_pipeline.shards.index import index_shards

    manifest = index_shards(
        options.shards, options.out, participants=options.participants, modality=options.modality,
        dataset=options.dataset, spacing=options.spacing, key_pattern=options.key_pattern, seed=options.seed,
        orientation=options.orientation, columns=options.columns,
        workers=options.workers, splits=parse_splits(options.splits) if options.splits else None,
    )  # fmt: skip
    excluded = int(manifest.settings.get("quarantined", 0))
    print(f"shards: indexed: {len(manifest.scans)} scans in {len(manifest.shards)} shards; manifest in {options.out}")
    print(f"shards: splits: {_counts(manifest.scans['split'])}; manifest digest {manifest.digest[:12]}")
    if excluded:
        print(f"shards: {excluded} samples were excluded; the reasons are in {options.out / 'quarantine.tsv'}")
    return 0


def _build(options: argparse.Namespace) -> int:
    from data_pipeline.cohort.split import parse_splits
    from data_pipeline.quality.columns import PAGE
    from data_pipeline.shards.build import build_shards
    from data_pipeline.storage.manifest import MANIFEST

    existed = (options.out / MANIFEST).is_file()
    manifest = build_shards(
        options.cohort, options.out, **reading_options(options), codec=options.codec,
        scans_per_shard=options.scans_per_shard, seed=options.seed,
        splits=parse_splits(options.splits) if options.splits else None,
    )  # fmt: skip
    excluded = int(manifest.settings.get("quarantined", 0))
    size = sum(int(row["bytes"]) for row in manifest.shards) / 1e6
    print(f"shards: {'already built' if existed else 'built'}: {len(manifest.scans)} scans in {len(manifest.shards)} shards, "
          f"{size:.1f} MB, in {options.out}")  # fmt: skip
    print(f"shards: splits: {_counts(manifest.scans['split'])}; manifest digest {manifest.digest[:12]}")
    if not existed:
        print(f"shards: how each column was read is in {options.out / PAGE}")
    if excluded:
        print(f"shards: {excluded} scans were excluded; the reasons are in {options.out / 'quarantine.tsv'}")
    return 0


def check_batch_build(arguments: list[str], size: JobSize) -> CheckedCommand:
    """Check the arguments of ``yaware shards build`` for a batch job. Raises UserError."""
    from data_pipeline.cohort.split import parse_splits
    from data_pipeline.shards.build import check_storage
    from data_pipeline.volume.preparation import check_preparation
    from infra.slurm.parser import OneLineParser

    parser = OneLineParser(prog="yaware shards build")
    add_build_arguments(parser)
    options = parse_with_quality(parser, arguments[1:])
    reading = reading_options(options)
    check_storage(
        parse_splits(options.splits) if options.splits else None, options.codec, options.scans_per_shard, seed=options.seed,
        scaling=options.scaling, workers=options.workers,
    )  # fmt: skip
    check_preparation(reading["modality"], reading["crop"], reading["intensity"])
    if not size.waits and not Path(options.cohort).exists():
        raise UserError(f"{options.cohort} is not there; give the folder or table of a cohort")
    check_output(options.out, "OUT")
    return CheckedCommand(arguments[1:], options.out)


def check_batch_prepare(arguments: list[str], size: JobSize) -> CheckedCommand:
    """Check the arguments of ``yaware cohort prepare`` for a batch job. Raises UserError."""
    from data_pipeline.prepare.cli import check_batch

    return check_batch(arguments, size)


def _append(options: argparse.Namespace) -> int:
    from data_pipeline.shards.append import append_shards
    from data_pipeline.storage.manifest import Manifest
    from data_pipeline.volume.grid import Grid

    before = Manifest.load(options.shards)
    after = append_shards(
        options.cohort, options.shards, dataset=options.dataset, workers=options.workers, reread=not options.skip_known,
        **layout_options(options),
        modality=options.modality, scaling=options.scaling, codec=options.codec,
        grid=None if options.spacing is None else Grid.vbm(options.spacing),
    )  # fmt: skip
    added = after.scans.iloc[len(before.scans) :]
    if not len(added):
        print(f"shards: nothing to append: {options.shards} holds every usable scan of {options.cohort} already")
        return 0
    record = after.settings["appended"][-1]
    print(f"shards: appended {len(added)} scans in {len(after.shards) - len(before.shards)} shards to {options.shards}, "
          f"which now holds {len(after.scans)}")  # fmt: skip
    print(f"shards: splits of the new scans: {_counts(added['split'])}; manifest digest {after.digest[:12]}")
    if record["quarantined"]:
        quarantine = Path(options.shards) / "quarantine.tsv"
        print(f"shards: {record['quarantined']} scans were excluded; the reasons are in {quarantine}")
    return 0


def _annotate(options: argparse.Namespace) -> int:
    from data_pipeline.shards.annotate import annotate_shards, state_licences
    from data_pipeline.storage.licences import in_words

    if bool(options.table) == bool(options.licence):
        raise UserError("give either a table of columns or --licence NAME=TEXT; found both or neither")
    if options.licence and (options.columns or options.rules):
        raise UserError("--columns and --rules are for a table of columns; leave them out beside --licence")
    if options.licence:
        manifest = state_licences(options.shards, _licences(options.licence), replace=options.replace)
        print(f"shards: licences: {in_words(manifest.licences())}")
        print(f"shards: manifest digest {manifest.digest[:12]}")
        return 0
    manifest, counts = annotate_shards(
        options.shards, options.table, options.columns, replace=options.replace, rules=options.rules
    )
    total = len(manifest.scans)
    for name, count in counts.items():
        print(f"shards: {name}: {count} of {total} scans have a value")
    print(f"shards: manifest digest {manifest.digest[:12]}")
    return 0


def _licences(given: list[str]) -> dict[str, str]:
    """The licence of each data set; raises UserError if one has no name or no text, or a name is given twice."""
    licences: dict[str, str] = {}
    for text in given:
        name, _, licence = text.partition("=")
        if not name.strip() or not licence.strip() or name.strip() in licences:
            raise UserError(f"--licence={text}: give each data set once, as in --licence ixi='CC BY-SA 3.0'")
        licences[name.strip()] = licence
    return licences


def _preview(options: argparse.Namespace) -> int:
    from data_pipeline.loading.preview import write_preview
    from data_pipeline.storage.manifest import Manifest

    remote = "://" in options.shards
    out = options.out or Path("." if remote else options.shards) / "preview.png"
    check_output(out, "--out")
    write_preview(Manifest.load(options.shards), out, augmentation=options.augmentation, scans=options.scans)
    print(f"shards: wrote {out}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from data_pipeline.shards.info import run_info

    folder = options.shards
    if "://" in folder:
        from data_pipeline.storage.manifest import fetch
        from data_pipeline.storage.remote import Access

        folder = str(fetch(folder, Access()))
    return run_info(folder, as_json=options.json)


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.shards.verify import find_problems, load_problem
    from data_pipeline.storage.manifest import Manifest

    unreadable = load_problem(options.shards)
    if unreadable:
        print(f"shards: {unreadable}")
        return 1
    manifest = Manifest.load(options.shards)
    problems = find_problems(manifest, options.workers)
    total = len(problems)
    if problems and options.repair:
        from data_pipeline.shards.repair import repair_shards

        problems = repair_shards(manifest, options.repair, problems, options.workers, **layout_options(options))
    for name, problem in problems.items():
        print(f"shards: {name}: {problem}")
    repaired = f", {total - len(problems)} repaired" if options.repair else ""
    print(f"shards: {len(manifest.shards)} shards, {len(manifest.scans)} scans{repaired}, {len(problems)} problems")
    return 1 if problems else 0


def _counts(column: object) -> str:
    """The counts of a column's values as text, the 12 most frequent by name."""
    import pandas as pd

    assert isinstance(column, pd.Series)
    counts = column.fillna("missing").replace("", "missing").value_counts()
    shown = ", ".join(f"{name} {count}" for name, count in counts.iloc[:12].items())
    return shown + (f" and {len(counts) - 12} more" if len(counts) > 12 else "")


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": _build, "append": _append, "annotate": _annotate, "index": _index, "preview": _preview, "info": _info,
    "verify": _verify,
}  # fmt: skip
COMMANDS: dict[str, Callable[[list[str]], int]] = {"cohort": cohort, "shards": shards}
BATCH_CHECKS: dict[str, Callable[[list[str], JobSize], CheckedCommand]] = {
    "cohort": check_batch_prepare, "shards": check_batch_build,
}  # fmt: skip
