"""The folder of one pretraining run: recipe.yaml, run.json, metrics.jsonl, checkpoints/. Written by rank 0 only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from infra.files import atomic_write, write_json
from infra.settings import flatten, to_dict, to_yaml
from pretrain.config import Recipe

# Keys that change where and how fast a run goes, not what it computes: a resumed run may set them anew.
FREE_TO_CHANGE = (
    "run.output", "run.tracking_uri",
    "data.shards", "data.workers", "data.threads", "data.prefetch", "data.device", "data.max_bad_share",
    "data.cache", "data.retries", "data.timeout", "deepspeed.zero_optimization.", "checkpoint.", "launch.",
    "train.watchdog_seconds", "train.max_skipped_steps", "run.resume", "monitor.",
)  # fmt: skip
# Keys without which another run's checkpoint does not fit into the model and optimiser (`run.resume: PATH`).
OF_THE_NETWORK = (
    "encoder.name", "encoder.options.", "projector.", "optimizer.name", "train.precision", "loss.temperature_bounds",
)  # fmt: skip
NAMED_BY_USERS = ("loss.proxies.", "encoder.options.", "augmentation.", "deepspeed.")


def method_of(recipe: Recipe) -> str:
    """What the recipe trains, in the field's words."""
    if recipe.train.steps == 0:
        return "random"
    if recipe.loss.name == "y-aware" and all(proxy.bandwidth == 0 for proxy in recipe.loss.proxies.values()):
        return "SimCLR"
    if recipe.loss.name == "regression":
        return f"{'+'.join(recipe.loss.proxies)} regression"
    return recipe.loss.name


def check_same_recipe(recipe: Recipe) -> None:
    """UserError where ``run.output`` already holds a run that computes something else; nothing is overwritten."""
    path = Path(recipe.run.output) / "recipe.yaml"
    if not path.is_file():
        return
    changed = _changes(recipe, OmegaConf.to_container(OmegaConf.load(path)))
    changed = {key: values for key, values in changed.items() if not key.startswith(FREE_TO_CHANGE)}
    if changed:
        raise UserError(
            f"run.output={recipe.run.output} holds a run of another recipe ({_shown(changed)}); "
            "choose another --run.output, or set the old values to continue it"
        )


def check_same_network(recipe: Recipe, other: dict[str, Any]) -> None:
    """UserError where the checkpoint of a run of recipe ``other`` does not fit into this one's model and optimiser."""
    changed = {key: v for key, v in _changes(recipe, other).items() if key.startswith(OF_THE_NETWORK)}
    if changed:
        raise UserError(
            f"run.resume={recipe.run.resume} is a checkpoint of another network ({_shown(changed)}); set the old values, or "
            "resume=never to begin anew"
        )


def check_writable(output: Path) -> None:
    """UserError where nothing can be written to a run's folder; makes nothing."""
    for folder in (output, output / "checkpoints"):
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"run.output={output} cannot be written: {place} is read-only or no folder; choose another --run.output"
            )


def _changes(recipe: Recipe, content: Any) -> dict[str, tuple[Any, Any]]:
    """Keys with another value in ``content`` (an older recipe, nested), each with that and the recipe's own."""
    old, new = flatten(content), flatten(to_dict(recipe))
    # A key that came with a later version was at its default; not so in sections that hold what the user names.
    defaults = flatten(to_dict(Recipe()))
    old = {**{key: defaults.get(key) for key in new if not key.startswith(NAMED_BY_USERS)}, **old}
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(changed.items())[:3])
    return shown + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def check_same_manifest(output: Path, manifest: Manifest) -> None:
    """UserError where the shards are not those that the run began with."""
    known = read_run(output).get("manifest_digest")
    if known not in (None, manifest.digest):
        raise UserError(
            f"{output} was begun on shards with digest {str(known)[:12]}, data.shards now has {manifest.digest[:12]}; "
            "bring the old shards back, or choose another --run.output"
        )


def read_run(output: Path) -> dict[str, Any]:
    """The content of run.json; empty where the run has not begun."""
    path = output / "run.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def begin_run(recipe: Recipe, manifest: Manifest, run_id: str | None) -> None:
    """Write recipe.yaml and run.json."""
    output = Path(recipe.run.output)
    with atomic_write(output / "recipe.yaml", "w") as stream:
        stream.write(to_yaml(recipe))
    write_json(output / "run.json", {**describe_run(recipe, manifest), "run_id": run_id})


def describe_run(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint tells about where it comes from."""
    return {
        "run_name": recipe.run.name,
        "experiment": recipe.run.experiment,
        "method": method_of(recipe),
        "manifest_digest": manifest.digest,
        "split": recipe.data.split,
        "simulated": bool(manifest.settings.get("simulated", False)),
        "version": version("yaware"),
    }


class MetricsFile:
    """metrics.jsonl: one line a step, cut back to the step from which a run resumes."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] < resume_step]
        with atomic_write(path, "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in kept)
        self._stream: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's figures."""
        self._stream.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a metrics.jsonl; a last line that a kill cut short is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
