"""MLflow's model registry: which checkpoint is the champion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import sha256_of
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of, environment, readable


def find_checkpoint(uri: str, given: str, *, experiment: str, step: int | None = None) -> dict[str, Any]:
    """The checkpoint (as of ``runs.checkpoints``) meant by a logged model's id, a run's id or a run's name.

    Of a run it is the last one, or that of ``step``; of an evaluation, the checkpoint that it judged. UserError where
    there is none.
    """
    if runs.has_model(uri, given):
        return runs.checkpoint(uri, given)
    run = runs.find_run(uri, given, experiment)
    judged = run["tags"].get("yaware.model_id")
    if judged:
        if not runs.has_model(uri, judged):
            raise UserError(f"run {given} judged model {judged}, which is not in {uri}")
        return runs.checkpoint(uri, judged)
    found = runs.checkpoints(uri, run["run_id"])
    if not found:
        raise UserError(f"run {given} has no checkpoint in {uri}; it may have ended before the first one")
    if step is None:
        return found[-1]
    for one in found:
        if one["step"] == step:
            return one
    raise UserError(f"run {given} has no checkpoint of step {step}; it has {', '.join(str(o['step']) for o in found)}")


def promote(uri: str, checkpoint: dict[str, Any], name: str, alias: str) -> str:
    """Register a checkpoint as a version of ``name`` and set ``alias`` to it; the version. The same one is registered once.

    UserError where a name is not one that MLflow takes, or the weights on disk are not those that were logged.
    """
    for what, text in (("name", name), ("alias", alias)):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or re.fullmatch(r"v[0-9]+", text) or text == "latest":
            raise UserError(f"--{what}={text}: letters, digits, - and _ are allowed, and neither v1, v2 ... nor latest")
    _check_weights(checkpoint)
    client = client_of(uri, create=False)
    from_model = {"source": f"models:/{checkpoint['model_id']}", "model_id": checkpoint["model_id"]}
    with readable(uri), environment(MLFLOW_TRACKING_URI=uri):
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        known = [v for v in client.search_model_versions(f"name = '{name}'") if v.source == from_model["source"]]
        version = known[0] if known else client.create_model_version(
            name, run_id=checkpoint["run_id"], tags={"yaware.step": str(checkpoint["step"])}, **from_model
        )  # fmt: skip
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def promoted(uri: str, name: str, alias: str) -> dict[str, Any]:
    """The checkpoint that ``name`` has under ``alias``; UserError where there is none."""
    client = client_of(uri, create=False)
    with readable(uri):
        version = client.get_model_version_by_alias(name, alias)
    return runs.checkpoint(uri, str(version.source).removeprefix("models:/"))


def _check_weights(checkpoint: dict[str, Any]) -> None:
    """A folder that is gone or changed since must not become what others rely on."""
    folder = Path(str(checkpoint["path"]))
    places = [place / "model.safetensors" for place in (folder, folder / "encoder")]
    weights = next((place for place in places if place.is_file()), None)
    if weights is None:
        raise UserError(f"checkpoint {checkpoint['name']}: {folder} has no weights here; promote it where they are")
    if checkpoint["sha256"] and sha256_of(weights) != checkpoint["sha256"]:
        raise UserError(f"checkpoint {checkpoint['name']}: {weights} is not the file that was logged; promote another")
