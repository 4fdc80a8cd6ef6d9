"""``yaware export``, ``embed`` and ``import-weights``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def export(arguments: list[str]) -> int:
    """Copy a checkpoint's encoder to a folder that needs nothing else."""
    parser = argparse.ArgumentParser(prog="yaware export", description=export.__doc__)
    parser.add_argument("checkpoint", help="a run folder (its latest checkpoint) or one of its checkpoints/step-*")
    parser.add_argument("out", type=Path, help="the folder to make")
    options = parser.parse_args(arguments)
    from pretrain.weights.write import export as copy_encoder

    print(f"export: wrote {copy_encoder(options.checkpoint, options.out)}")
    return 0


def embed(arguments: list[str]) -> int:
    """Features of NIfTI files, brought to the encoder's grid as its training scans were."""
    parser = argparse.ArgumentParser(prog="yaware embed", description=embed.__doc__)
    parser.add_argument("encoder", help="an exported encoder, a checkpoint or a run folder")
    parser.add_argument(
        "scans", nargs="+", type=Path, help="NIfTI files of the modality that the encoder was trained on"
    )
    parser.add_argument("--tiv", type=float, nargs="+", help="total intracranial volumes in ml, for scaling: tiv")
    parser.add_argument("--out", type=Path, help="table to write (.tsv); default: standard output")
    options = parser.parse_args(arguments)
    from pretrain.weights.embedding import embed_files, write_table
    from pretrain.weights.encoder import Encoder

    encoder = Encoder.from_pretrained(options.encoder)
    rows = embed_files(encoder, encoder.preprocessing, options.scans, options.tiv)
    write_table(rows, options.out)
    if options.out:
        print(f"embed: wrote {options.out}: {len(rows)} scans, {len(rows[0][1])} features")
    return 0


def import_weights(arguments: list[str]) -> int:
    """Bring published weights into an export folder, for `yaware evaluate` and `Encoder.from_pretrained`."""
    parser = argparse.ArgumentParser(prog="yaware import-weights", description=import_weights.__doc__)
    parser.add_argument("file", type=Path, help="the published checkpoint, as downloaded")
    parser.add_argument("--arch", required=True, help="its layout: densenet121-yaware (Dufumier et al. 2021, BHB-10K)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--grid", help="of its scans: mm of a voxel in the VBM box (default 1.5, CAT12's), or shards to take it from"
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave weights that the file lacks as initialised")
    options = parser.parse_args(arguments)
    from pretrain.weights.import_weights import import_weights as bring
    from pretrain.weights.import_weights import scans_of

    scans = scans_of(options.grid)
    out, match = bring(options.file, options.arch, options.out, allow_missing=options.allow_missing, **scans)
    print(f"{match.report()}\nimport-weights: wrote {out}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "export": export, "embed": embed, "import-weights": import_weights,
}  # fmt: skip
