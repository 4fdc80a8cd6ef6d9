"""MLflow's model registry: register checkpoints under a name and an alias, and look them up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.files import sha256_of
from infra.tracking import runs
from infra.tracking.mlflow_store import client_of, query_errors, temporary_environment


def find_checkpoint(uri: str, reference: str, *, experiment: str, step: int | None = None) -> dict[str, Any]:
    """Return a checkpoint, in the form of ``runs.checkpoints``.

    Args:
        uri: the MLflow store.
        reference: the id of a logged model; NAME@ALIAS of a registered model; the id of a run; or the name of a
            pretraining. A pretraining stands for its last checkpoint, an evaluation for the checkpoint it evaluated.
        experiment: where the name of a pretraining is looked up.
        step: choose this checkpoint of a pretraining instead of the last one.

    Raises:
        UserError: if there is no such checkpoint.
    """
    name, at, alias = reference.partition("@")
    if at:
        return promoted(uri, name, alias)
    if runs.has_model(uri, reference):
        return runs.checkpoint(uri, reference)
    run = runs.find_run(uri, reference, experiment)
    evaluated = run["tags"].get("yaware.model_id")
    if evaluated:
        if not runs.has_model(uri, evaluated):
            raise UserError(f"run {reference} evaluated model {evaluated}, which is not in {uri}")
        return runs.checkpoint(uri, evaluated)
    checkpoints = runs.checkpoints(uri, run["run_id"])
    if not checkpoints:
        raise UserError(f"run {reference} has no checkpoint in {uri}; it may have ended before the first one")
    if step is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint["step"] == step:
            return checkpoint
    steps = ", ".join(str(checkpoint["step"]) for checkpoint in checkpoints)
    raise UserError(f"run {reference} has no checkpoint of step {step}; it has {steps}")


def promote(uri: str, checkpoint: dict[str, Any], name: str, alias: str) -> str:
    """Register a checkpoint as a version of model ``name`` and set ``alias`` to it. Return the version.

    A checkpoint that is already registered keeps its version. Raises UserError if MLflow does not allow ``name`` or
    ``alias``, or if the weights on disk are not the ones that were logged.
    """
    for option, text in (("name", name), ("alias", alias)):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", text) or re.fullmatch(r"v[0-9]+", text) or text == "latest":
            raise UserError(f"--{option}={text}: use letters, digits, - and _; v1, v2 ... and latest are reserved")
    _check_weights(checkpoint)
    client = client_of(uri, create=False)
    from_model = {"source": f"models:/{checkpoint['model_id']}", "model_id": checkpoint["model_id"]}
    with query_errors(uri), temporary_environment(MLFLOW_TRACKING_URI=uri):
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        registered = [version for version in versions if version.source == from_model["source"]]
        version = registered[0] if registered else client.create_model_version(
            name, run_id=checkpoint["run_id"], tags={"yaware.step": str(checkpoint["step"])}, **from_model
        )  # fmt: skip
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def promoted(uri: str, name: str, alias: str) -> dict[str, Any]:
    """Return the checkpoint that registered model ``name`` has under ``alias``. Raises UserError if there is none."""
    client = client_of(uri, create=False)
    with query_errors(uri):
        version = client.get_model_version_by_alias(name, alias)
    return runs.checkpoint(uri, str(version.source).removeprefix("models:/"))


def _check_weights(checkpoint: dict[str, Any]) -> None:
    """Raise UserError if the weights are missing on this machine or differ from the logged digest."""
    folder = Path(str(checkpoint["path"]))
    candidates = [parent / "model.safetensors" for parent in (folder, folder / "encoder")]
    weights = next((path for path in candidates if path.is_file()), None)
    if weights is None:
        raise UserError(f"checkpoint {checkpoint['name']}: no weights in {folder}; promote it on a host that has them")
    if checkpoint["sha256"] and sha256_of(weights) != checkpoint["sha256"]:
        raise UserError(f"checkpoint {checkpoint['name']}: {weights} differs from the logged file; promote another one")
