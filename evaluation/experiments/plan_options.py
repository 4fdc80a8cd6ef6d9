"""A plan on the command line, and the plan that a folder belongs to. A plan is a frozen dataclass of numbers and tuples."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from infra.errors import UserError
from infra.files import atomic_write, read_text
from infra.processes.allowance import usable_cores

AnyPlan = TypeVar("AnyPlan")


def add_plan_options(parser: argparse.ArgumentParser, plan: type[Any]) -> None:
    """Add an option for every field of a plan, ``--network-draws`` for ``network_draws``, with its default."""
    for setting in fields(plan):
        is_list = isinstance(setting.default, tuple)
        first = setting.default[0] if isinstance(setting.default, tuple) else setting.default
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(first),
            default=setting.default,
            nargs="+" if is_list else None,
        )


def plan_of(options: argparse.Namespace, plan: type[AnyPlan]) -> AnyPlan:
    """Return the plan that the options describe.

    Raises UserError if a plan with networks has not a number of their draws for each training size.
    """
    values = {setting.name: getattr(options, setting.name) for setting in fields(plan)}  # type: ignore[arg-type]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    sizes, draws = values.get("sizes", ()), values.get("network_draws")
    if draws is not None and len(draws) != len(sizes):
        raise UserError(
            f"--network-draws has {len(draws)} numbers and --sizes {len(sizes)}; give a number of draws for each size"
        )
    return plan(**values)


def default_jobs() -> int:
    """Return how many processes run at a time: one per core, or 1 on a GPU."""
    return 1 if torch.cuda.is_available() else usable_cores()


def check_plan_file(out: Path, plan: Any) -> None:
    """Write the plan to OUT/plan.json, or compare it with the plan that is there.

    Raises UserError if the folder holds an experiment with another plan.
    """
    path, settings = out / "plan.json", json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        stored = json.loads(read_text(path))
        changed = [key for key in settings if stored.get(key) != settings[key]]
        if changed:
            raise UserError(
                f"{out} holds an experiment with {changed[0]}={stored.get(changed[0])}, but this one has "
                f"{changed[0]}={settings[changed[0]]}; choose another --out, or remove {out}"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as stream:
        json.dump(settings, stream, indent=1)
