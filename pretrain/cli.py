"""``yaware pretrain``, ``export``, ``embed`` and ``import-weights``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Recipe


def pretrain(arguments: list[str]) -> int:
    """Check the recipe here, where an error is one line, then hand it to the deepspeed launcher."""
    parser = argparse.ArgumentParser(
        prog="yaware pretrain",
        description="Pretrain an encoder: `deepspeed --num_accelerators N --module pretrain.train --config ...`.",
        epilog="Any key of the recipe is overridden by --section.key=value, as in --optimizer.lr=3e-4.",
    )
    parser.add_argument("--config", required=True, help="a shipped recipe (demo-cpu, ...) or a YAML file")
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="short for --run.resume (default: auto)")
    options, overrides = parser.parse_known_args(arguments)
    if options.resume:
        overrides = [*overrides, f"--run.resume={options.resume}"]

    from infra.settings import to_yaml
    from pretrain.config import load_recipe

    recipe = load_recipe(options.config, overrides)
    if options.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from pretrain.run.checkpoint import newest_step, step_folder, verify_checkpoint
    from pretrain.train import make_plan

    plan = make_plan(recipe, recipe.launch.ranks)
    checkpoints = Path(recipe.run.output) / "checkpoints"
    newest = newest_step(checkpoints)
    # A damaged last checkpoint is made again from the one before.
    if newest is not None and newest >= plan.total_steps and not verify_checkpoint(step_folder(checkpoints, newest)):
        _send_what_waits(recipe)
        print(f"pretrain: {recipe.run.name} is already complete: {plan.total_steps} steps, {checkpoints}")
        return 0
    from pretrain.launch.start import start_on_this_host

    end = start_on_this_host([options.config, *overrides], recipe.launch.ranks, Path(recipe.run.output))
    if end.reason:
        print(f"pretrain: {end.reason}", file=sys.stderr, flush=True)
    return end.status


def _send_what_waits(recipe: Recipe) -> None:
    """Send to MLflow what a run could not send before it ended."""
    from infra.tracking.tracking import default_uri, send_spool
    from pretrain.run.log import SPOOL

    spool = Path(recipe.run.output) / SPOOL
    if spool.is_file() and send_spool(recipe.run.tracking_uri or default_uri(), spool):
        print("pretrain: sent to MLflow what waited for it")


def export(arguments: list[str]) -> int:
    """Copy a checkpoint's encoder to a folder that needs nothing else."""
    parser = argparse.ArgumentParser(prog="yaware export", description=export.__doc__)
    parser.add_argument("checkpoint", help="a run folder (its latest checkpoint) or one of its checkpoints/step-*")
    parser.add_argument("out", type=Path, help="the folder to make")
    options = parser.parse_args(arguments)
    from pretrain.weights.encoder import export_encoder

    print(f"export: wrote {export_encoder(options.checkpoint, options.out)}")
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
    from pretrain.weights.embed import embed_files, write_table

    rows = embed_files(options.encoder, options.scans, options.tiv)
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
    "pretrain": pretrain, "export": export, "embed": embed, "import-weights": import_weights,
}  # fmt: skip
