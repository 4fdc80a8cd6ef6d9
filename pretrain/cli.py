"""``yaware pretrain``."""

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
    from pretrain.run.plan import make_plan

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
    from infra.tracking.tracker import default_uri, send_spool
    from pretrain.run.log import SPOOL

    spool = Path(recipe.run.output) / SPOOL
    if spool.is_file() and send_spool(recipe.run.tracking_uri or default_uri(), spool):
        print("pretrain: sent to MLflow what waited for it")


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pretrain": pretrain}
