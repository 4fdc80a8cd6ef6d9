"""``yaware pretrain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from infra.slurm.batch_script import RECIPE_COPY, CheckedCommand, JobSize


def pretrain(arguments: list[str]) -> int:
    """Check a recipe, so that an error is one line, then start its ranks on this host with DeepSpeed's launcher."""
    options, overrides = _parse(argparse.ArgumentParser, arguments)

    from infra.settings import to_yaml
    from pretrain.config import load_recipe

    recipe = load_recipe(options.config, overrides)
    if options.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from pretrain.api import report_if_complete
    from pretrain.run.plan import make_plan

    if report_if_complete(make_plan(recipe, recipe.launch.ranks)):
        return 0
    from pretrain.launch.start import start_on_this_host

    end = start_on_this_host([options.config, *overrides], recipe.launch.ranks, Path(recipe.run.output))
    if end.reason:
        print(f"pretrain: {end.reason}", file=sys.stderr, flush=True)
    return end.status


def _parse(parser_class: type[argparse.ArgumentParser], arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the overrides of the recipe, those of the short options included."""
    parser = parser_class(
        prog="yaware pretrain",
        description="Pretrain an encoder from a recipe. The same command continues a run from its last checkpoint. "
        "This checks the recipe and runs `deepspeed --num_accelerators N --module pretrain.train --config ...`.",
        epilog="--section.key=value overrides any key of the recipe, for example --optimizer.lr=3e-4.",
    )
    parser.add_argument(
        "--config", required=True, help="name of a shipped recipe (demo-cpu, ...) or path of a YAML file"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and exit")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="short for --run.resume (default: auto)")
    parser.add_argument("--trust", action="store_true", help="continue also from a checkpoint that another user owns")
    options, overrides = parser.parse_known_args(arguments)
    if options.trust:
        overrides = [*overrides, "--run.trust=true"]
    if options.resume:
        overrides = [*overrides, f"--run.resume={options.resume}"]
    return options, overrides


def check_batch(arguments: list[str], size: JobSize) -> CheckedCommand:
    """Check the recipe, and its shards if they should be there, for a batch job with so many ranks. Raises UserError."""
    from infra.settings import to_yaml
    from infra.slurm.parser import OneLineParser
    from pretrain.config import check_micro_batch, find_recipe, load_recipe
    from pretrain.encoders import check_encoder
    from pretrain.run.plan import make_plan

    options, overrides = _parse(OneLineParser, arguments)
    recipe = load_recipe(options.config, overrides)
    check_micro_batch(recipe.batch, size.tasks)
    check_encoder(recipe.encoder.name, recipe.encoder.options)
    if not size.waits:
        make_plan(recipe, size.tasks)
    if find_recipe(options.config) == Path(options.config):  # a file of the user, which may change while the job waits
        return CheckedCommand([RECIPE_COPY], Path(recipe.run.output), to_yaml(recipe))
    return CheckedCommand([options.config, *overrides], Path(recipe.run.output))


COMMANDS: dict[str, Callable[[list[str]], int]] = {"pretrain": pretrain}
BATCH_CHECKS: dict[str, Callable[[list[str], JobSize], CheckedCommand]] = {"pretrain": check_batch}
