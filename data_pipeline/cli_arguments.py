"""The arguments that several commands of ``yaware cohort`` and ``yaware shards`` share, and their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.volume.grid import Grid


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware shards build``."""
    add_reading_arguments(parser)
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--codec", default="zst", help="zst (default), or npy, which DALI's own reader decodes")
    parser.add_argument("--scans-per-shard", type=int, default=256, help="scans in a shard (default 256)")
    parser.add_argument(
        "--splits",
        help="share of the healthy participants in each split (default pretrain=.7,monitor=.1,downstream=.2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle and the splits (default 0)")


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which ``shards build`` and ``cohort inspect`` read, prepare and judge the scans of a cohort."""
    parser.add_argument(
        "cohort", help="folder of a data set, table of paths (.csv, .tsv), or list of data sets (.yaml)"
    )
    parser.add_argument("--dataset", help="name with which every key begins (default: the name of the cohort's folder)")
    parser.add_argument("--modality", default="vbm", help="vbm (grey-matter maps, default), t1w or quasiraw")
    add_layout_arguments(parser)
    parser.add_argument(
        "--spacing", type=float, help="edge of a voxel in mm: bring scans to the VBM box with such voxels"
    )
    parser.add_argument(
        "--shape",
        metavar="D,H,W",
        help="with --spacing: bring scans to a grid of this shape, centred on the origin of the world",
    )
    parser.add_argument(
        "--crop",
        default="world",
        help="world (default): use the position in the header; brain: centre the grid on the brain",
    )
    parser.add_argument(
        "--intensity", help="none (default for vbm), or robust: scale the 1st to 99th percentile to 0..1"
    )
    parser.add_argument("--scaling", default="none", help="none (default), or tiv: divide by total intracranial volume")
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="YAML file whose section quality: holds the quality rules; --quality.key=value sets a single rule",
    )
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the layout, the columns and the pseudonyms of a cohort."""
    parser.add_argument("--layout", help="bids, cat12, openbhb or csv (default: detected from the folder's content)")
    parser.add_argument(
        "--columns", type=Path, metavar="FILE", help="YAML file that declares columns and the rules for their values"
    )
    parser.add_argument(
        "--pseudonymise", type=Path, metavar="KEYFILE",
        help="replace ids by hashes keyed by the bytes of this file (16 or more)",
    )  # fmt: skip


def add_append_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware shards append``."""
    parser.add_argument("cohort", help="folder, table of paths or list of data sets, as for build")
    parser.add_argument("shards", help="folder of shards; the existing shards are not rewritten")
    parser.add_argument(
        "--dataset", help="name with which every new key begins (default: the name of the cohort's folder)"
    )
    parser.add_argument(
        "--skip-known",
        action="store_true",
        help="do not read scans whose key exists already (default: read them and compare their voxels)",
    )
    add_layout_arguments(parser)
    parser.add_argument("--modality", help="refuse shards with another modality")
    parser.add_argument("--spacing", type=float, help="refuse shards with another spacing")
    parser.add_argument("--scaling", help="refuse shards with another scaling")
    parser.add_argument("--codec", help="refuse shards with another codec")
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def add_annotate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware shards annotate``."""
    parser.add_argument("shards", help="folder of shards")
    parser.add_argument(
        "table",
        nargs="?",
        help=".tsv or .csv file with participant_id, and with session and dataset if the values differ by them",
    )
    parser.add_argument(
        "--columns", type=lambda text: text.split(","), help="columns to add, separated by commas (default: all)"
    )
    parser.add_argument(
        "--rules", type=Path, metavar="FILE", help="YAML file that declares columns and the rules for their values"
    )
    parser.add_argument(
        "--licence", action="append", metavar="NAME=TEXT", help="the licence of a data set; may be given several times"
    )
    parser.add_argument(
        "--replace", action="store_true", help="overwrite columns, or licences, that the shards have already"
    )


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware shards index``."""
    parser.add_argument(
        "shards", help="folder or URL of .tar files with .npy, .npy.gz, .npy.zst, .nii or .nii.gz members"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the manifest; it may be the folder of the tars"
    )
    parser.add_argument(
        "--participants", help="participants' table (default: participants.tsv beside the tars or one folder up)"
    )
    parser.add_argument(
        "--columns",
        type=Path,
        metavar="FILE",
        help="YAML file that declares the table's columns and rules for their values",
    )
    parser.add_argument("--modality", help="name of the modality (default: by shape, vbm, or quasiraw for 182x218x182)")
    parser.add_argument(
        "--dataset", help="data set of scans whose key and table name none (default: the name of the folder)"
    )
    parser.add_argument("--spacing", type=float, help="edge of a voxel in mm, for .npy members of an unknown shape")
    parser.add_argument(
        "--orientation", default="", help="orientation of .npy members, for example LAS (default: by shape)"
    )
    parser.add_argument("--key-pattern", help="regular expression with groups participant_id, session, run, dataset")
    parser.add_argument(
        "--splits",
        help="share of the healthy participants in each split (default pretrain=.7,monitor=.1,downstream=.2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle and the splits (default 0)")
    parser.add_argument("--workers", type=int, help="Ray workers (default: every core, or the cluster of RAY_ADDRESS)")


def parse_with_quality(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the options; ``--quality.key=value`` goes to ``quality_overrides`` if the command has ``--quality``."""
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if not (argument.startswith("--quality.") and "quality" in options)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.quality_overrides = rest
    return options


def layout_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_layout_arguments`` as keyword arguments."""
    return {"layout": options.layout, "columns": options.columns, "key_file": options.pseudonymise}


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_reading_arguments`` as keyword arguments of ``build_shards`` and ``inspect_cohort``."""
    from data_pipeline.quality.rules import load_quality

    return {
        "dataset": options.dataset, "modality": options.modality, "grid": grid_option(options), "crop": options.crop,
        "intensity": options.intensity, "scaling": options.scaling, "workers": options.workers,
        "quality": load_quality(options.quality, options.quality_overrides), **layout_options(options),
    }  # fmt: skip


def grid_option(options: argparse.Namespace) -> Grid | None:
    """The grid of --spacing and --shape; raises UserError if one of them is wrong."""
    from data_pipeline.volume.grid import Grid

    if options.spacing is not None and not 0.5 <= options.spacing <= 20:
        raise UserError(f"--spacing={options.spacing} is not in 0.5..20 mm")
    if options.shape is None:
        return None if options.spacing is None else Grid.vbm(options.spacing)
    shape = [int(word) if word.strip().isdigit() else 0 for word in options.shape.split(",")]
    if len(shape) != 3 or not all(1 <= length <= 1024 for length in shape):
        raise UserError(f"--shape={options.shape} must be three numbers of voxels in 1..1024, for example 128,160,128")
    if options.spacing is None:
        raise UserError(f"--shape={options.shape} also needs the edge of a voxel in mm, for example --spacing 1.5")
    return Grid.centred(tuple(shape), options.spacing)
