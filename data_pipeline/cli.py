"""``yaware cohort`` and ``yaware shards``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from infra.errors import UserError


def cohort(arguments: list[str]) -> int:
    """Make a cohort."""
    parser = argparse.ArgumentParser(prog="yaware cohort", description="Make a cohort of scans.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    simulate = commands.add_parser("simulate", help="write a simulated cohort as a BIDS folder of NIfTI files")
    if arguments[:1] == ["simulate"]:  # the simulator is slow to import; `yaware cohort --help` does without
        from data_pipeline.simulate import add_simulate_arguments, run_simulate

        add_simulate_arguments(simulate)
        return run_simulate(parser.parse_args(arguments))
    parser.parse_args(arguments)
    return 0


def shards(arguments: list[str]) -> int:
    """Build, extend, preview, describe or verify shards."""
    parser = argparse.ArgumentParser(prog="yaware shards", description="WebDataset shards of a cohort.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="from a BIDS folder to shards and their manifest"))
    preview = commands.add_parser("preview", help="a picture of some scans and two augmented views of each")
    preview.add_argument("shards")
    preview.add_argument("--out", type=Path, help="PNG to write (default: preview.png beside the shards)")
    preview.add_argument("--augmentation", default="default", help="preset: none, default, paper-all, paper-cutout")
    preview.add_argument("--scans", type=int, default=4)
    _add_append(commands.add_parser("append", help="add a data set, or newly arrived scans, to built shards"))
    info = commands.add_parser("info", help="counts, ages, sites, splits, sizes")
    info.add_argument("shards")
    info.add_argument("--json", action="store_true", help="the same for programs")
    verify = commands.add_parser("verify", help="every byte against its checksum")
    verify.add_argument("shards")
    verify.add_argument("--repair", metavar="COHORT", help="build damaged and missing shards again from this cohort")
    verify.add_argument("--workers", type=int, help="threads, and Ray workers for --repair (default: every core)")
    options = parser.parse_args(arguments)
    return RUN[options.command](options)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cohort", help="BIDS-like folder with participants.tsv and sub-*/[ses-*/]anat/*.nii.gz")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--dataset", help="name that every key begins with (default: the cohort folder's name)")
    parser.add_argument("--modality", default="vbm", help="vbm (grey-matter maps, default) or t1w")
    parser.add_argument("--spacing", type=float, help="bring scans to the VBM box cut into voxels of so many mm")
    parser.add_argument("--scaling", default="none", help="none, or tiv: divide by total intracranial volume")
    parser.add_argument("--codec", default="zst", help="zst (default) or npy, which DALI's own reader decodes")
    parser.add_argument("--scans-per-shard", type=int, default=256)
    parser.add_argument(
        "--splits", help="shares of the healthy participants, as in pretrain=.7,monitor=.1,downstream=.2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _add_append(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cohort", help="BIDS-like folder, as for build")
    parser.add_argument("shards", help="folder of built shards; none of its shards is rewritten")
    parser.add_argument("--dataset", help="name that every new key begins with (default: the cohort folder's name)")
    parser.add_argument(
        "--skip-known", action="store_true", help="do not read scans again whose key is there, to compare their voxels"
    )
    parser.add_argument("--modality", help="refuse shards of another modality; so for the next three")
    parser.add_argument("--spacing", type=float)
    parser.add_argument("--scaling")
    parser.add_argument("--codec")
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _append(options: argparse.Namespace) -> int:
    from data_pipeline.append import append_shards
    from data_pipeline.manifest import Manifest
    from data_pipeline.volume import Grid

    before = Manifest.load(options.shards)
    after = append_shards(
        options.cohort, options.shards, dataset=options.dataset, workers=options.workers, reread=not options.skip_known,
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


def _build(options: argparse.Namespace) -> int:
    from data_pipeline.build import build_shards
    from data_pipeline.manifest import MANIFEST
    from data_pipeline.split import parse_splits
    from data_pipeline.volume import Grid

    if options.spacing is not None and not 0.5 <= options.spacing <= 20:
        raise UserError(f"--spacing={options.spacing} is not in 0.5..20 mm")
    before = (options.out / MANIFEST).is_file()
    manifest = build_shards(
        options.cohort, options.out, dataset=options.dataset, modality=options.modality,
        grid=None if options.spacing is None else Grid.vbm(options.spacing), scaling=options.scaling, codec=options.codec,
        scans_per_shard=options.scans_per_shard, seed=options.seed, workers=options.workers,
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


def _preview(options: argparse.Namespace) -> int:
    from data_pipeline.manifest import Manifest
    from data_pipeline.preview import write_preview

    out = options.out or Path(options.shards) / "preview.png"
    write_preview(Manifest.load(options.shards), out, augmentation=options.augmentation, scans=options.scans)
    print(f"shards: wrote {out}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from data_pipeline.info import run_info

    return run_info(options.shards, as_json=options.json)


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.manifest import Manifest
    from data_pipeline.verify import find_problems, load_problem

    broken = load_problem(options.shards)
    if broken:
        print(f"shards: {broken}")
        return 1
    manifest = Manifest.load(options.shards)
    problems = find_problems(manifest, options.workers)
    found = len(problems)
    if problems and options.repair:
        from data_pipeline.repair import repair_shards

        problems = repair_shards(manifest, options.repair, problems, options.workers)
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
    "build": _build, "append": _append, "preview": _preview, "info": _info, "verify": _verify,
}  # fmt: skip
COMMANDS: dict[str, Callable[[list[str]], int]] = {"cohort": cohort, "shards": shards}
