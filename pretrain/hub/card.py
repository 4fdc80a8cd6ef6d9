"""The model card of an exported encoder: README.md, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "unknown (the data set states none)"


def model_card(config: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> str:
    """Return the text of README.md for an encoder with this config.json and preprocessing.json."""
    place = "path/to/this/folder"
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
    return f"""# {config["run_name"]}: {config["encoder"]["name"]}, step {config["step"]}
{simulated}
- method: {config["method"]}
- features: {config["feature_size"]}, encoder options {config["encoder"]["options"] or "as by default"}
- input: (B, 1, {", ".join(map(str, grid.get("shape", [])))}) float32 at {grid.get("spacing")} mm, RAS,
  z-scored per scan, modality {preprocessing.get("modality")}, scaling {preprocessing.get("scaling")},
  crop {preprocessing.get("crop", "world")}, intensity {preprocessing.get("intensity", "none")}
{prepared}- data: manifest {config["manifest_digest"]}, split {config["split"]}
- made by yaware {config["version"]}, MLflow run {config["run_id"]}

    import yaware
    encoder = yaware.Encoder.from_pretrained("{place}")
    features = encoder.embed(["scan.nii.gz"]{tiv})        # a table of 1 row, {config["feature_size"]} columns

`yaware embed {place} scan.nii.gz{option}` does the same; `encoder(volumes)` takes prepared volumes.
{_data(config)}"""


def _data(config: Mapping[str, Any]) -> str:
    """The section about the data sets of the training and their licences."""
    licences: Mapping[str, Sequence[str]] | None = config.get("licences")
    if licences is None:
        return ""
    if not licences:
        return "\n## Data\n\nTrained on no scans.\n"
    rows = [f"| {_cell(name)} | {_cell(' and '.join(texts)) or UNKNOWN} |" for name, texts in licences.items()]
    head = (
        "Trained on scans of these data sets. The licences are those of the data, in the words of the data sets; what they\n"
        "forbid, such as redistribution or commercial use, may hold for the weights too."
    )
    return "\n".join(["", "## Data", "", head, "", "| data set | licence |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    """A text of somebody else as a cell of a Markdown table: nothing in it is read as Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&])", r"\\\1", " ".join(text.split()))
