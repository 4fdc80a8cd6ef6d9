"""``yaware cohort`` and ``yaware shards``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import UserError


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
        from data_pipeline.simulate import add_simulate_arguments, run_simulate

        add_simulate_arguments(simulate)
        return run_simulate(parser.parse_args(arguments))
    return _inspect(_with_quality(parser, arguments))


def shards(arguments: list[str]) -> int:
    """Build, preview, describe or verify shards."""
    parser = argparse.ArgumentParser(prog="yaware shards", description="WebDataset shards of a cohort.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="from a BIDS folder to shards and their manifest"))
    preview = commands.add_parser("preview", help="a picture of some scans and two augmented views of each")
    preview.add_argument("shards")
    preview.add_argument("--out", type=Path, help="PNG to write (default: preview.png beside the shards)")
    preview.add_argument("--augmentation", default="default", help="preset: none, default, paper-all, paper-cutout")
    preview.add_argument("--scans", type=int, default=4)
    for name, what in (("info", "counts, ages, sites, splits, sizes"), ("verify", "every shard against its checksum")):
        commands.add_parser(name, help=what).add_argument("shards")
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
    """How a cohort is read, by ``shards build`` and ``cohort inspect`` alike."""
    parser.add_argument("cohort", help="BIDS-like folder with participants.tsv and sub-*/[ses-*/]anat/*.nii.gz")
    parser.add_argument("--dataset", help="name that every key begins with (default: the cohort folder's name)")
    parser.add_argument("--modality", default="vbm", help="vbm (grey-matter maps, default) or t1w")
    parser.add_argument("--spacing", type=float, help="bring scans to the VBM box cut into voxels of so many mm")
    parser.add_argument("--scaling", default="none", help="none, or tiv: divide by total intracranial volume")
    parser.add_argument(
        "--quality", type=Path, metavar="FILE", help="YAML with a section quality: of rules; --quality.outlier.robust_z=-4 "
        "and the like change single ones (data_pipeline/quality.py lists them)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """What ``_add_reading`` asked for, as keywords of ``build_shards`` and ``survey_cohort``."""
    from data_pipeline.quality import load_quality
    from data_pipeline.volume import Grid

    if options.spacing is not None and not 0.5 <= options.spacing <= 20:
        raise UserError(f"--spacing={options.spacing} is not in 0.5..20 mm")
    return {
        "dataset": options.dataset, "modality": options.modality, "scaling": options.scaling, "workers": options.workers,
        "grid": None if options.spacing is None else Grid.vbm(options.spacing),
        "quality": load_quality(options.quality, options.quality_overrides),
    }  # fmt: skip


def _inspect(options: argparse.Namespace) -> int:
    from data_pipeline.inspect_cohort import inspect_cohort

    page = inspect_cohort(options.cohort, options.out, **_reading(options))
    print(f"cohort: wrote {page} and, beside it, quarantine.tsv")
    return 0


def _build(options: argparse.Namespace) -> int:
    from data_pipeline.build import build_shards
    from data_pipeline.manifest import MANIFEST
    from data_pipeline.split import parse_splits

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


def _preview(options: argparse.Namespace) -> int:
    from data_pipeline.manifest import Manifest
    from data_pipeline.preview import write_preview

    out = options.out or Path(options.shards) / "preview.png"
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
    "build": _build, "preview": _preview, "info": _info, "verify": _verify,
}  # fmt: skip
COMMANDS: dict[str, Callable[[list[str]], int]] = {"cohort": cohort, "shards": shards}
