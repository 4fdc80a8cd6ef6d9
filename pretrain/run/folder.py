"""The folder of a pretraining run: recipe.yaml, run.json, metrics.jsonl, checkpoints/. Only rank 0 writes them."""

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
from infra.files import atomic_write, read_object, read_text, regular_file, write_json
from infra.settings import flatten, to_dict, to_yaml
from pretrain.config import Recipe

# Keys that change where and how fast a run computes, but not what: a resumed run may change them.
CHANGEABLE = (
    "run.output", "run.tracking_uri",
    "data.shards", "data.workers", "data.threads", "data.prefetch", "data.device", "data.max_bad_share",
    "data.cache", "data.retries", "data.timeout", "deepspeed.zero_optimization.", "checkpoint.", "launch.",
    "train.watchdog_seconds", "train.max_skipped_steps", "run.resume", "run.trust", "monitor.", "readouts.",
)  # fmt: skip
# Keys that must be equal for another run's checkpoint to fit the model and the optimiser (`run.resume: PATH`).
NETWORK_KEYS = (
    "encoder.name", "encoder.options.", "projector.", "optimizer.name", "train.precision", "loss.temperature_bounds",
    "loss.reconstruction.layer", "loss.dense.layer",
)  # fmt: skip
# Terms of the loss that add weights to the model: both recipes must have them, or neither.
NETWORK_TERMS = ("loss.reconstruction.weight", "loss.dense.weight")
# Sections whose keys the user chooses: they have no defaults.
USER_KEYS = ("loss.proxies.", "encoder.options.", "augmentation.", "deepspeed.")


def method_of(recipe: Recipe) -> str:
    """Return the name of the method that the recipe trains: random, SimCLR, "age regression" or the loss's name."""
    if recipe.train.steps == 0:
        return "random"
    if recipe.loss.name == "y-aware" and all(proxy.bandwidth == 0 for proxy in recipe.loss.proxies.values()):
        return "SimCLR"
    if recipe.loss.name == "regression":
        return f"{'+'.join(recipe.loss.proxies)} regression"
    return recipe.loss.name


def check_same_recipe(recipe: Recipe) -> None:
    """Raise UserError if ``run.output`` already holds a run that computes something else."""
    path = Path(recipe.run.output) / "recipe.yaml"
    if not path.exists():
        return
    changed = _changes(recipe, OmegaConf.to_container(OmegaConf.load(regular_file(path))))
    changed = {key: values for key, values in changed.items() if not key.startswith(CHANGEABLE)}
    if changed:
        raise UserError(
            f"run.output={recipe.run.output} holds a run of another recipe ({_shown(changed)}); "
            "choose another --run.output, or set the old values to continue it"
        )


def check_same_network(recipe: Recipe, other: Any) -> None:
    """Raise UserError if a checkpoint of recipe ``other`` (nested dicts) does not fit this recipe's model and optimiser."""
    if not isinstance(other, dict) or not other:
        raise UserError(f"run.resume={recipe.run.resume}: state.json says no recipe; take another checkpoint")
    changed = {
        key: values for key, values in _changes(recipe, other).items()
        if key.startswith(NETWORK_KEYS) or (key in NETWORK_TERMS and None in values)
    }  # fmt: skip
    if changed:
        raise UserError(
            f"run.resume={recipe.run.resume} is a checkpoint of another network ({_shown(changed)}); set the old values, or "
            "resume=never to start anew"
        )


def check_writable(output: Path) -> None:
    """Raise UserError if a run's folder cannot be written to. Creates nothing."""
    for folder in (output, output / "checkpoints"):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"run.output={output} cannot be written: {existing} is read-only or no folder; choose another --run.output"
            )


def _changes(recipe: Recipe, content: Any) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose value differs in ``content`` (an older recipe, nested dicts), with old and new value."""
    old, new = flatten(content), flatten(to_dict(recipe))
    # The old recipe may lack a key that a later version added; it then had the default.
    defaults = flatten(to_dict(Recipe()))
    old = {**{key: defaults.get(key) for key in new if not key.startswith(USER_KEYS)}, **old}
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(changed.items())[:3])
    return shown + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def check_same_manifest(output: Path, manifest: Manifest) -> None:
    """Raise UserError if the shards are not those that the run started with."""
    digest = read_run(output).get("manifest_digest")
    if digest not in (None, manifest.digest):
        raise UserError(
            f"the run in {output} started on shards with digest {str(digest)[:12]}, data.shards now has "
            f"{manifest.digest[:12]}; restore the old shards, or choose another --run.output"
        )


def read_run(output: Path) -> dict[str, Any]:
    """Return the content of run.json; empty if the run has not started."""
    path = output / "run.json"
    return read_object(path, "restore it, or choose another --run.output") if path.exists() else {}


def begin_run(recipe: Recipe, manifest: Manifest, run_id: str | None) -> None:
    """Write recipe.yaml and run.json."""
    output = Path(recipe.run.output)
    with atomic_write(output / "recipe.yaml", "w") as stream:
        stream.write(to_yaml(recipe))
    write_json(output / "run.json", {**describe_run(recipe, manifest), "run_id": run_id})


def describe_run(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """Return the run's origin, which its checkpoints and its MLflow run record."""
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
    """metrics.jsonl: one line per step. On resume, the steps that will be repeated are cut off."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] < resume_step]
        with atomic_write(path, "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in kept)
        self._stream: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Append the metrics of a step."""
        self._stream.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the steps of a metrics.jsonl, without a last line that a kill has truncated."""
    if path.exists():
        for line in read_text(path).splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return
