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
    """Build, preview, describe or verify shards."""
    parser = argparse.ArgumentParser(prog="yaware shards", description="WebDataset shards of a cohort.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="from a BIDS folder to shards and their manifest"))
    _add_index(
        commands.add_parser("index", help="a manifest for WebDataset shards made elsewhere, which stay as they are")
    )
    preview = commands.add_parser("preview", help="a picture of some scans and two augmented views of each")
    preview.add_argument("shards")
    preview.add_argument("--out", type=Path, help="PNG to write (default: preview.png beside the shards)")
    preview.add_argument("--augmentation", default="default", help="preset: none, default, paper-all, paper-cutout")
    preview.add_argument("--scans", type=int, default=4)
    for name, what in (("info", "counts, ages, sites, splits, sizes"), ("verify", "every shard against its checksum")):
        commands.add_parser(name, help=what).add_argument("shards")
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


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards", help="folder or URL with .tar files of .npy, .npy.gz, .npy.zst, .nii or .nii.gz members"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifest; may be that of the tars")
    parser.add_argument("--participants", help="table (default: participants.tsv beside the tars or one folder up)")
    parser.add_argument("--modality", help="name (default by shape: vbm, or quasiraw for 182x218x182)")
    parser.add_argument("--dataset", help="of scans whose key and table name none (default: the folder's name)")
    parser.add_argument("--spacing", type=float, help="voxel size in mm, where .npy members are of no known shape")
    parser.add_argument("--key-pattern", help="regular expression with groups participant_id, session, run, dataset")
    parser.add_argument(
        "--splits", help="shares of the healthy participants, as in pretrain=.7,monitor=.1,downstream=.2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _index(options: argparse.Namespace) -> int:
    from data_pipeline.reindex import index_shards
    from data_pipeline.split import parse_splits

    manifest = index_shards(
        options.shards, options.out, participants=options.participants, modality=options.modality,
        dataset=options.dataset, spacing=options.spacing, key_pattern=options.key_pattern, seed=options.seed,
        workers=options.workers, splits=parse_splits(options.splits) if options.splits else None,
    )  # fmt: skip
    bad = int(manifest.settings["quarantined"])
    print(f"shards: indexed: {len(manifest.scans)} scans in {len(manifest.shards)} shards; manifest in {options.out}")
    print(f"shards: splits: {_counts(manifest.scans['split'])}; manifest digest {manifest.digest[:12]}")
    if bad:
        print(f"shards: {bad} were left out; the reasons are in {options.out / 'quarantine.tsv'}")
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

    remote = "://" in options.shards
    out = options.out or Path("." if remote else options.shards) / "preview.png"
    write_preview(Manifest.load(options.shards), out, augmentation=options.augmentation, scans=options.scans)
    print(f"shards: wrote {out}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from data_pipeline.manifest import Manifest

    manifest = Manifest.load(options.shards)
    scans, grid, settings = manifest.scans, manifest.grid, manifest.settings
    people = scans["dataset"] + "/" + scans["participant_id"]
    size = sum(int(row["bytes"]) for row in manifest.shards) / 1e6
    lines = {
        "data": f"{settings['dataset']}, {settings['modality']}, scaling {settings['scaling']}"
        + (", simulated" if manifest.simulated else ""),
        "scans": f"{len(scans)} of {people.nunique()} participants in {len(manifest.shards)} shards, {size:.1f} MB",
        "grid": f"{' x '.join(map(str, grid['shape']))} voxels of {' x '.join(f'{v:g}' for v in grid['spacing'])} mm",
        "age": f"{scans['age'].mean():.1f} ± {scans['age'].std():.1f} years ({scans['age'].min():.0f} to "
        f"{scans['age'].max():.0f}), {int(scans['age'].isna().sum())} missing",
        "sex": _counts(scans["sex"]),
        "sites": f"{scans['site'].nunique()}: {_counts(scans['site'])}",
        "splits": _counts(scans["split"]),
        "digest": manifest.digest,
    }
    if "diagnosis" in scans:
        lines["diagnosis"] = _counts(scans["diagnosis"])
    for name, text in lines.items():
        print(f"{name:<10} {text}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from data_pipeline.manifest import Manifest
    from data_pipeline.verify import verify_shards

    manifest = Manifest.load(options.shards)
    problems = verify_shards(manifest)
    for problem in problems:
        print(f"shards: {problem}")
    print(f"shards: {len(manifest.shards)} shards, {len(manifest.scans)} scans, {len(problems)} problems")
    return 1 if problems else 0


def _counts(column: object) -> str:
    import pandas as pd

    assert isinstance(column, pd.Series)
    counts = column.fillna("missing").replace("", "missing").value_counts()
    shown = ", ".join(f"{name} {count}" for name, count in counts.iloc[:12].items())
    return shown + (f" and {len(counts) - 12} more" if len(counts) > 12 else "")


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "build": _build, "index": _index, "preview": _preview, "info": _info, "verify": _verify,
}  # fmt: skip
COMMANDS: dict[str, Callable[[list[str]], int]] = {"cohort": cohort, "shards": shards}
