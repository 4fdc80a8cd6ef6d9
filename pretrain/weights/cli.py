"""The commands ``yaware export``, ``yaware embed``, ``yaware import-weights`` and ``yaware digests``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from infra.files import check_output

if TYPE_CHECKING:
    import pandas as pd

    from pretrain.weights.encoder import Encoder
    from pretrain.weights.scan_source import ScanSource


def export(arguments: list[str]) -> int:
    """Copy a checkpoint's encoder to a folder that needs nothing else."""
    parser = argparse.ArgumentParser(prog="yaware export", description=export.__doc__)
    parser.add_argument(
        "checkpoint",
        help="a run folder (its latest checkpoint), one of its checkpoints/step-*, or hf://owner/name@revision",
    )
    parser.add_argument("out", type=Path, help="the folder to make; if it holds this export already, it stays")
    parser.add_argument(
        "--hub-layout",
        action="store_true",
        help="make a folder to publish at the Hugging Face hub: a card with its metadata and the licences of the data",
    )
    parser.add_argument(
        "--licence", help="with --hub-layout: of the weights, such as cc-by-nc-4.0 (default: the card says unknown)"
    )
    options = parser.parse_args(arguments)
    check_output(options.out, "OUT")
    from pretrain.weights.write import export as copy_encoder

    out = copy_encoder(options.checkpoint, options.out, hub_layout=options.hub_layout, licence=options.licence)
    print(f"export: wrote {out}")
    if options.hub_layout and not options.licence:
        print(f"export: {out / 'README.md'} says that the licence of the weights is unknown; --licence states it")
    return 0


def embed(arguments: list[str]) -> int:
    """Write the features of scans, brought to the encoder's grid as its training scans were; raw ones are prepared first.

    A scan that cannot be read is left out and named at the end (status 1). The same command continues a killed one.
    """
    options = _embed_parser().parse_args(arguments)
    from pretrain.weights.embedding import embed_table
    from pretrain.weights.encoder import Encoder
    from pretrain.weights.feature_file import check_format, embed_to_file, to_tsv, write_table
    from pretrain.weights.scan_source import warning_lines

    if options.out:
        check_format(options.out)
        check_output(options.out, "--out")
    if options.gap and options.shards is None:
        raise UserError("--gap needs the true values, which are in --shards; that is not given")
    encoder = Encoder.from_pretrained(options.encoder)
    source = _source(options, encoder)
    names = ("layer", "pooling", "batch_size", "device", "workers")
    keywords: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.readouts or options.gap:
        keywords["readouts"], source.identify = encoder.need_readouts(), True
    if options.out:
        table, unreadable, taken = embed_to_file(options.encoder, source, options.out, loaded=encoder, **keywords)
        if options.gap and len(table):
            table = _with_gaps(table, encoder, options.shards)
            write_table(table, options.out)
        continued = f", {taken} of them embedded before the last run ended" if taken else ""
        if len(table):
            others = [str(name) for name in table if not str(name).removeprefix("f").isdigit()]
            added = "".join(f", {name}" for name in others)
            print(
                f"embed: wrote {options.out}: {len(table)} scans{continued}, {table.shape[1] - len(others)} features{added}"
            )
    else:
        table, unreadable = embed_table(encoder.network, source, **keywords)
        if options.gap and len(table):
            table = _with_gaps(table, encoder, options.shards)
        print(to_tsv(table), end="")
    for line in warning_lines(source, encoder.preprocessing):
        print(f"embed: warning: {line}", file=sys.stderr)
    if "readouts" in keywords and (known := encoder.known_scans_line(source)):
        print(f"embed: warning: {known}", file=sys.stderr)
    if unreadable:
        lines = "".join(f"  {name}: {reason}\n" for name, reason in unreadable.items())
        print(
            f"embed: {len(unreadable)} of {len(source.names)} scans cannot be read:\n{lines}", end="", file=sys.stderr
        )
    return 1 if unreadable else 0


def import_weights(arguments: list[str]) -> int:
    """Bring published weights into an export folder, for `yaware evaluate` and `Encoder.from_pretrained`."""
    parser = argparse.ArgumentParser(prog="yaware import-weights", description=import_weights.__doc__)
    parser.add_argument("file", type=Path, help="the published checkpoint, as downloaded")
    parser.add_argument(
        "--arch",
        required=True,
        help="its layout, such as densenet121-yaware (Dufumier et al. 2021); an unknown one lists all",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--grid",
        help="grid of its training scans: the voxel size in mm of the VBM box (default 1.5, CAT12's), or a folder of "
        "shards to take it from",
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave weights that the file lacks as initialised")
    options = parser.parse_args(arguments)
    check_output(options.out, "--out")
    from pretrain.weights.import_weights import import_weights as import_file
    from pretrain.weights.import_weights import preprocessing_from

    preprocessing = None if options.grid is None else preprocessing_from(options.grid)
    out, match = import_file(
        options.file, options.arch, options.out, preprocessing=preprocessing, allow_missing=options.allow_missing
    )
    print(f"{match.report()}\nimport-weights: wrote {out}")
    return 0


def _embed_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yaware embed", description=embed.__doc__)
    parser.add_argument("encoder", help="an exported encoder, a checkpoint, a run folder, or hf://owner/name@revision")
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        help="NIfTI files, folders of them, or .tsv/.csv tables with a column path (and tiv)",
    )
    parser.add_argument("--shards", help="embed the scans of this folder or URL of shards")
    parser.add_argument("--split", nargs="+", help="with --shards: only these splits")
    parser.add_argument("--query", help="with --shards: only scans that fulfil this pandas query")
    parser.add_argument(
        "--tiv", type=float, nargs="+", help="total intracranial volumes in ml, one per scan, for scaling: tiv"
    )
    parser.add_argument(
        "--orientation", default="", help="of .npy files, such as LAS (default: as the training scans')"
    )
    parser.add_argument(
        "--prepared", type=Path, metavar="DIR",
        help="folder in which prepared raw scans stay, to be found again (default: none is kept)",
    )  # fmt: skip
    parser.add_argument(
        "--no-prepare", action="store_true", help="read raw scans as they are, also if the training scans were prepared"
    )
    parser.add_argument("--out", type=Path, help="table to write, .tsv or .parquet; default: .tsv on standard output")
    parser.add_argument("--layer", help="a block inside the network; default: its end")
    parser.add_argument(
        "--pooling",
        nargs="+",
        default=["mean"],
        help="of a block: mean, max, std, grid2 to grid8, none (default: mean; without --layer the encoder's own features)",
    )
    parser.add_argument(
        "--readouts",
        action="store_true",
        help="add predictions of the proxies with 95%% intervals: predicted_age, predicted_age_low, predicted_age_high",
    )
    parser.add_argument(
        "--gap",
        action="store_true",
        help="with --shards: --readouts, and gap_age: predicted minus true age, without its dependence on age",
    )
    parser.add_argument(
        "--batch-size", type=int, help="scans per forward pass (default: 8, on a CPU fewer if they are large)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--workers", type=int, help="threads that read ahead (default: one per core, at most 8)")
    return parser


def _with_gaps(table: pd.DataFrame, encoder: Encoder, shards: str) -> pd.DataFrame:
    """Add the corrected gaps of scans of shards; the index of the table holds their keys."""
    import pandas as pd

    from data_pipeline.storage.manifest import Manifest

    scans = Manifest.load(shards).scans
    true = scans.set_index(scans["key"].astype(str)).loc[table.index]
    return pd.concat([table, encoder.need_readouts().gaps(table, true)], axis=1)


def _source(options: argparse.Namespace, encoder: Encoder) -> ScanSource:
    """The scans of the command line."""
    from data_pipeline.storage.manifest import Manifest
    from pretrain.weights.feature_file import find_scans
    from pretrain.weights.scan_source import RawScans, scan_source

    if bool(options.scans) == bool(options.shards):
        found = "both" if options.scans else "neither"
        raise UserError(f"give either files, folders or tables of scans, or --shards; found {found}")
    if options.shards is None:
        if options.split or options.query:
            raise UserError("--split and --query choose scans of --shards, which is not given")
        return scan_source(
            find_scans(options.scans, tiv=encoder.preprocessing.get("scaling") == "tiv"),
            encoder.preprocessing,
            tiv=options.tiv,
            orientation=options.orientation,
            raw=RawScans(not options.no_prepare, options.prepared),
        )
    given = {"--tiv": options.tiv, "--orientation": options.orientation, "--prepared": options.prepared,
             "--no-prepare": options.no_prepare}  # fmt: skip
    if unused := [name for name, value in given.items() if value]:
        raise UserError(
            f"{' and '.join(unused)} describe files, and scans of --shards are prepared and scaled; leave that out"
        )
    manifest = Manifest.load(options.shards)
    rows = manifest.rows(split=options.split, query=options.query)
    if not len(rows):
        raise UserError(f"--query={options.query!r} leaves no scan of {options.shards}")
    return scan_source(rows, encoder.preprocessing, manifest)


def digests(arguments: list[str]) -> int:
    """Write digests of the people and scans of shards, by which others can check for leakage; the file names nobody."""
    parser = argparse.ArgumentParser(prog="yaware digests", description=digests.__doc__)
    parser.add_argument("shards", help="folder or URL of the shards that an encoder was trained on")
    parser.add_argument("--split", type=lambda text: text.split(","), help="only these splits, as pretrain,monitor")
    parser.add_argument("--query", help="only the scans that a pandas query over scans.parquet selects")
    parser.add_argument("--out", type=Path, default=Path("digests.json"), help="file to write (default: digests.json)")
    options = parser.parse_args(arguments)
    check_output(options.out, "--out")
    from data_pipeline.storage.manifest import Manifest
    from infra.files import write_json
    from pretrain.weights.seen_scans import source_of, to_json

    manifest = Manifest.load(options.shards)
    rows = manifest.rows(split=options.split, query=options.query)
    if not len(rows):
        chosen = f"--query {options.query!r}" if options.query else "--split"
        raise UserError(f"{chosen} selects none of the {len(manifest.scans)} scans of {options.shards}; select some")
    source = source_of(manifest, rows)
    write_json(options.out, to_json([source]))
    voxels = (
        "no voxels, which these shards have no digests of" if source.voxels is None else f"{len(source.voxels)} scans"
    )
    print(f"digests: wrote {options.out}: {len(source.participants)} people, {voxels}; for yaware evaluate --seen")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "export": export, "embed": embed, "import-weights": import_weights, "digests": digests,
}  # fmt: skip
