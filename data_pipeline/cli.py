"""``yaware cohort`` and ``yaware shards``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.volume.grid import Grid


def cohort(arguments: list[str]) -> int:
    """Make a cohort, or look at one."""
    parser = argparse.ArgumentParser(prog="yaware cohort", description="Make a cohort of scans, or look at one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    simulate = commands.add_parser("simulate", help="write a simulated cohort as a BIDS folder of NIfTI files")
    inspect = commands.add_parser(
        "inspect", help="tables and an HTML page: who is there, which scans a build would leave out"
    )
    _add_reading(inspect)
    inspect.add_argument("--out", type=Path, help="folder for the page (default: inspect-<data set> in this folder)")
    if arguments[:1] == ["simulate"]:  # the simulator is slow to import; `yaware cohort --help` does without
        from data_pipeline.simulation.cli import add_simulate_arguments, run_simulate

        add_simulate_arguments(simulate)
        return run_simulate(parser.parse_args(arguments))
    return _inspect(_with_quality(parser, arguments))


def shards(arguments: list[str]) -> int:
    """Build, extend, preview, describe or verify shards."""
    parser = argparse.ArgumentParser(prog="yaware shards", description="WebDataset shards of a cohort.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="from a BIDS folder to shards and their manifest"))
    _add_index(
        commands.add_parser("index", help="a manifest for WebDataset shards made elsewhere, which stay as they are")
    )
    preview = commands.add_parser("preview", help="a picture of some scans and two augmented views of each")
    preview.add_argument("shards")
    preview.add_argument("--out", type=Path, help="PNG to write (default: preview.png beside the shards)")
    preview.add_argument(
        "--augmentation", default="default", help="preset: none, default, t1w, paper-all, paper-cutout"
    )
    preview.add_argument("--scans", type=int, default=4)
    _add_append(commands.add_parser("append", help="add a data set, or newly arrived scans, to built shards"))
    annotate = commands.add_parser("annotate", help="add columns of a table (a proxy, a label) to built shards")
    annotate.add_argument("shards")
    annotate.add_argument("table", help=".tsv or .csv with participant_id, and session and dataset where they matter")
    annotate.add_argument("--columns", type=lambda text: text.split(","), help="which of its columns (default: all)")
    annotate.add_argument("--replace", action="store_true", help="also columns that the shards have already")
    info = commands.add_parser("info", help="counts, ages, sites, splits, sizes")
    info.add_argument("shards")
    info.add_argument("--json", action="store_true", help="the same for programs")
    verify = commands.add_parser("verify", help="every byte against its checksum")
    verify.add_argument("shards")
    verify.add_argument("--repair", metavar="COHORT", help="build damaged and missing shards again from this cohort")
    _add_layout(verify)
    verify.add_argument("--workers", type=int, help="threads, and Ray workers for --repair (default: every core)")
    options = _with_quality(parser, arguments)
    return RUN[options.command](options)


def _with_quality(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options, and the overrides ``--quality.key=value`` where the command has a ``--quality``."""
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if not (word.startswith("--quality.") and "quality" in options)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.quality_overrides = rest
    return options


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_reading(parser)
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--codec", default="zst", help="zst (default) or npy, which DALI's own reader decodes")
    parser.add_argument("--scans-per-shard", type=int, default=256)
    parser.add_argument(
        "--splits", help="shares of the healthy participants, as in pretrain=.7,monitor=.1,downstream=.2"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How a cohort is read and its scans are prepared and judged, by ``shards build`` and ``cohort inspect`` alike."""
    parser.add_argument(
        "cohort", help="folder of a data set, a table of paths (.csv, .tsv), or a list of data sets (.yaml)"
    )
    parser.add_argument("--dataset", help="name that every key begins with (default: the cohort folder's name)")
    parser.add_argument("--modality", default="vbm", help="vbm (grey-matter maps, default), t1w or quasiraw")
    _add_layout(parser)
    parser.add_argument("--spacing", type=float, help="bring scans to the VBM box cut into voxels of so many mm")
    parser.add_argument("--shape", metavar="D,H,W", help="a grid of one's own, with --spacing, centred on the origin")
    parser.add_argument("--crop", default="world", help="lay the grid's middle by the world (default) or on the brain")
    parser.add_argument("--intensity", help="none (default for vbm) or robust: 1st to 99th percentile to 0..1")
    parser.add_argument("--scaling", default="none", help="none, or tiv: divide by total intracranial volume")
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="YAML whose section quality: holds rules; --quality.key=value sets one",
    )
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", help="bids, cat12, openbhb or csv (default: by what the folder holds)")
    parser.add_argument(
        "--columns", type=Path, metavar="FILE", help="YAML that declares columns and rules of their values"
    )
    parser.add_argument(
        "--pseudonymise", type=Path, metavar="KEYFILE",
        help="replace ids by hashes keyed by this file's bytes (16 or more)",
    )  # fmt: skip


def _add_append(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cohort", help="BIDS-like folder, as for build")
    parser.add_argument("shards", help="folder of built shards; none of its shards is rewritten")
    parser.add_argument("--dataset", help="name that every new key begins with (default: the cohort folder's name)")
    parser.add_argument(
        "--skip-known", action="store_true", help="do not read scans again whose key is there, to compare their voxels"
    )
    _add_layout(parser)
    parser.add_argument("--modality", help="refuse shards of another modality; so for the next three")
    parser.add_argument("--spacing", type=float)
    parser.add_argument("--scaling")
    parser.add_argument("--codec")
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _layout(options: argparse.Namespace) -> dict[str, Any]:
    return {"layout": options.layout, "columns": options.columns, "key_file": options.pseudonymise}


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``_add_reading`` as ``build_shards`` and ``inspect_cohort`` take them."""
    from data_pipeline.quality.rules import load_quality

    return {
        "dataset": options.dataset, "modality": options.modality, "grid": _grid(options), "crop": options.crop,
        "intensity": options.intensity, "scaling": options.scaling, "workers": options.workers,
        "quality": load_quality(options.quality, options.quality_overrides), **_layout(options),
    }  # fmt: skip


def _grid(options: argparse.Namespace) -> Grid | None:
    from data_pipeline.volume.grid import Grid

    if options.spacing is not None and not 0.5 <= options.spacing <= 20:
        raise UserError(f"--spacing={options.spacing} is not in 0.5..20 mm")
    if options.shape is None:
        return None if options.spacing is None else Grid.vbm(options.spacing)
    edges = [int(part) if part.strip().isdigit() else 0 for part in options.shape.split(",")]
    if len(edges) != 3 or not all(1 <= edge <= 1024 for edge in edges):
        raise UserError(f"--shape={options.shape} is not three whole numbers of voxels in 1..1024, as in 128,160,128")
    if options.spacing is None:
        raise UserError(f"--shape={options.shape} needs the voxels' edge in mm too, as in --spacing 1.5")
    return Grid.centred(tuple(edges), options.spacing)


def _inspect(options: argparse.Namespace) -> int:
    from data_pipeline.quality.inspect import inspect_cohort

    page = inspect_cohort(options.cohort, options.out, **_reading(options))
    print(f"cohort: wrote {page} and, beside it, quarantine.tsv")
    return 0


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards", help="folder or URL with .tar files of .npy, .npy.gz, .npy.zst, .nii or .nii.gz members"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifest; may be that of the tars")
    parser.add_argument("--participants", help="table (default: participants.tsv beside the tars or one folder up)")
    parser.add_argument("--modality", help="name (default by shape: vbm, or quasiraw for 182x218x182)")
    parser.add_argument("--dataset", help="of scans whose key and table name none (default: the folder's name)")
    parser.add_argument("--spacing", type=float, help="voxel size in mm, where .npy members are of no known shape")
    parser.add_argument("--orientation", default="", help="of .npy members, as in LAS (default: usual of their shape)")
    parser.add_argument("--key-pattern", help="regular expression with groups participant_id, session, run, dataset")
    parser.add_argument(
        "--splits", help="shares of the healthy participants, as in pretrain=.7,monitor=.1,downstream=.2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _index(options: argparse.Namespace) -> int:
    from data_pipeline.cohort.split import parse_splits
    from data_pipeline.shards.index import index_shards

    manifest = index_shards(
        options.shards, options.out, participants=options.participants, modality=options.modality,
        dataset=options.dataset, spacing=options.spacing, key_pattern=options.key_pattern, seed=options.seed,
        orientation=options.orientation,
        workers=options.workers, splits=parse_splits(options.splits) if options.splits else None,
    )  # fmt: skip
    bad = int(manifest.settings["quarantined"])
    print(f"shards: indexed: {len(manifest.scans)} scans in {len(manifest.shards)} shards; manifest in {options.out}")
    print(f"shards: splits: {_counts(manifest.scans['split'])}; manifest digest {manifest.digest[:12]}")
    if bad:
        print(f"shards: {bad} were left out; the reasons are in {options.out / 'quarantine.tsv'}")
    return 0


def _build(options: argparse.Namespace) -> int:
    from data_pipeline.cohort.split import parse_splits
    from data_pipeline.shards.build import build_shards
    from data_pipeline.storage.manifest import MANIFEST

    before = (options.out / MANIFEST).is_file()
    manifest = build_shards(
        options.cohort, options.out, **_reading(options), codec=options.codec,
        scans_per_shard=options.scans_per_shard, seed=options.seed,
        splits=parse_splits(options.splits) if options.splits else None,
    )  # fmt: skip
    bad = int(manifest.settings["quarantined"])
    size = sum(int(row["bytes"]) for row in manifest.shards) / 1e6
    print(f"shards: {'already built' if before else 'built'}: {len(manifest.scans)} scans in {len(manifest.shards)} shards, "
          f"{size:.1f} MB, in {options.out}")  # fmt: skip
    print(f"shards: splits: {_counts(manifest.scans['split'])}; manifest digest {manifest.digest[:12]}")
    if bad:
        print(f"shards: {bad} scans were left out; the reasons are in {options.out / 'quarantine.tsv'}")
    return 0


def _append(options: argparse.Namespace) -> int:
    from data_pipeline.shards.append import append_shards
    from data_pipeline.storage.manifest import Manifest
    from data_pipeline.volume.grid import Grid

    before = Manifest.load(options.shards)
    after = append_shards(
        options.cohort, options.shards, dataset=options.dataset, workers=options.workers, reread=not options.skip_known,
        **_layout(options),
        modality=options.modality, scaling=options.scaling, codec=options.codec,
        grid=None if options.spacing is None else Grid.vbm(options.spacing),
    )  # fmt: skip
    added = after.scans.iloc[len(before.scans) :]
    if not len(added):
        print(f"shards: nothing to append: {options.shards} holds every usable scan of {options.cohort}")
        return 0
    part = after.settings["appended"][-1]
    print(f"shards: appended {len(added)} scans in {len(after.shards) - len(before.shards)} shards to {options.shards}, "
          f"which now holds {len(after.scans)}")  # fmt: skip
    print(f"shards: splits of the new scans: {_counts(added['split'])}; manifest digest {after.digest[:12]}")
    if part["quarantined"]:
        print(f"shards: {part['quarantined']} scans were left out; see {Path(options.shards) / 'quarantine.tsv'}")
    return 0


def _annotate(options: argparse.Namespace) -> int:
    from data_pipeline.shards.annotate import annotate_shards

    manifest, known = annotate_shards(options.shards, options.table, options.columns, replace=options.replace)
    total = len(manifest.scans)
    for name, count in known.items():
        print(f"shards: {name}: known of {count} of {total} scans")
    print(f"shards: manifest digest {manifest.digest[:12]}")
    return 0


def _preview(options: argparse.Namespace) -> int:
    from data_pipeline.loading.preview import write_preview
    from data_pipeline.storage.manifest import Manifest

    remote = "://" in options.shards
    out = options.out or Path("." if remote else options.shards) / "preview.png"
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

    broken = load_problem(options.shards)
    if broken:
        print(f"shards: {broken}")
        return 1
    manifest = Manifest.load(options.shards)
    problems = find_problems(manifest, options.workers)
    found = len(problems)
    if problems and options.repair:
        from data_pipeline.shards.repair import repair_shards

        problems = repair_shards(manifest, options.repair, problems, options.workers, **_layout(options))
    for name, problem in problems.items():
        print(f"shards: {name}: {problem}")
    repaired = f", {found - len(problems)} repaired" if options.repair else ""
    print(f"shards: {len(manifest.shards)} shards, {len(manifest.scans)} scans{repaired}, {len(problems)} problems")
    return 1 if problems else 0


def _counts(column: object) -> str:
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
