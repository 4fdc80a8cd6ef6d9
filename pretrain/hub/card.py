"""The model card of an encoder, README.md: for people, and with a metadata block for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

HUB = "hf://OWNER/NAME@REVISION"  # the place of a published encoder in the card's example
UNKNOWN = "unknown"
# Licences that the hub knows by these names (its documentation of model cards); any other is "other" with a name.
HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m",
    "openrail++", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "ms-pl", "mpl-2.0", "odc-by", "odbl",
    "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "wtfpl", "unknown",
}  # fmt: skip
TAGS = ("brain-mri", "neuroimaging", "medical-imaging", "3d", "safetensors")


def hub_card(config: Mapping[str, Any], preprocessing: Mapping[str, Any], licence: str) -> str:
    """Return the card of a published encoder, with the metadata that the hub reads.

    ``licence`` is that of the weights, as their publisher states it; empty if nothing is stated, which the card then says.
    """
    metadata = yaml.safe_dump(_metadata(config, preprocessing, licence), sort_keys=False, allow_unicode=True)
    stated = _escaped(licence) if licence else "unknown: the publisher states none"
    return f"---\n{metadata}---\n\n{model_card(config, preprocessing, HUB)}\n## Licence of the weights\n\n{stated}\n"


def _metadata(config: Mapping[str, Any], preprocessing: Mapping[str, Any], licence: str) -> dict[str, Any]:
    """The metadata block of a card. The hub would take names of data sets for its own; the card itself names them."""
    known = (licence or UNKNOWN).lower()
    named = {"license": known} if known in HUB_LICENCES else {"license": "other", "license_name": _slug(licence)}
    words = (*TAGS, preprocessing.get("modality"), config["encoder"]["name"], config["method"])
    tags = [_slug(str(word)) for word in words if word] + (["simulated-data"] if config.get("simulated") else [])
    return {
        **named, "library_name": "yaware", "pipeline_tag": "image-feature-extraction", "tags": list(dict.fromkeys(tags)),
    }  # fmt: skip


def model_card(config: Mapping[str, Any], preprocessing: Mapping[str, Any], place: str = "path/to/this/folder") -> str:
    """Return the text of a card for an encoder with this config.json and preprocessing.json, which is read from ``place``."""
    grid = preprocessing.get("grid", {})
    simulated = "\nPretrained on **simulated** scans: of no use on real ones.\n" if config.get("simulated") else ""
    # An example: 1450 ml is about the mean of adults.
    tiv, option = (", tiv=[1450.0]", " --tiv 1450") if preprocessing.get("scaling") == "tiv" else ("", "")
    recipe = (preprocessing.get("preparation") or {}).get("recipe", {})
    prepared = (
        f"- scans: prepared by `yaware cohort prepare`, pipeline {recipe['pipeline']}, version {recipe['version']}, "
        f"{recipe['spacing']:g} mm;\n  a raw scan is prepared so before it is embedded\n"
        if recipe
        else ""
    )
    run = f", MLflow run {config['run_id']}" if config.get("run_id") else ""
    return f"""# {_escaped(config["run_name"])}: {config["encoder"]["name"]}, step {config["step"]}
{simulated}
- method: {_escaped(config["method"])}
- features: {config["feature_size"]}, encoder options {config["encoder"]["options"] or "as by default"}
- input: (B, 1, {", ".join(map(str, grid.get("shape", [])))}) float32 at {grid.get("spacing")} mm, RAS,
  z-scored per scan, modality {preprocessing.get("modality")}, scaling {preprocessing.get("scaling")},
  crop {preprocessing.get("crop", "world")}, intensity {preprocessing.get("intensity", "none")}
{prepared}- data: manifest {config.get("manifest_digest")}, split {config["split"]}
- made by yaware {config.get("version")}{run}

    import yaware
    encoder = yaware.Encoder.from_pretrained("{place}")
    features = encoder.embed(["scan.nii.gz"]{tiv})        # a table of 1 row, {config["feature_size"]} columns

`yaware embed {place} scan.nii.gz{option}` does the same; `encoder(volumes)` takes prepared volumes.
{_imported(config)}{_data(config)}"""


def _imported(config: Mapping[str, Any]) -> str:
    """The paragraph about weights that ``import-weights`` brought here; config.json of earlier versions has no licence."""
    source = config.get("source")
    if not isinstance(source, Mapping):
        return ""
    told = {
        key: _escaped(str(source.get(key, "not recorded"))) for key in ("file", "sha256", "arch", "data", "licence")
    }
    return (
        f"\nImported from `{told['file']}` (SHA-256 {told['sha256']}, layout {told['arch']}, epoch "
        f"{config.get('epoch')}). Step, manifest and MLflow run are unknown; the grid was given at the import.\n\n"
        f"Trained on {told['data']}. Licence of the published weights: {told['licence']}.\n"
    )


def _data(config: Mapping[str, Any]) -> str:
    """The section about the data sets of the training and their licences."""
    licences: Mapping[str, Sequence[str]] | None = config.get("licences")
    if licences is None:
        return ""
    if not licences:
        return "\n## Data\n\nTrained on no scans.\n"
    rows = [
        f"| {_escaped(name)} | {_escaped(' and '.join(texts)) or 'unknown (the data set states none)'} |"
        for name, texts in licences.items()
    ]
    head = (
        "Trained on scans of these data sets. The licences are those of the data, in the words of the data sets; what they\n"
        "forbid, such as redistribution or commercial use, may hold for the weights too."
    )
    return "\n".join(["", "## Data", "", head, "", "| data set | licence |", "|---|---|", *rows, ""])


def _escaped(text: str) -> str:
    """A text of somebody else in one line, in which nothing is read as Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _slug(text: str) -> str:
    """A text as a tag: small letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"
