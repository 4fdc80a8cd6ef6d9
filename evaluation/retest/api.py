"""``yaware.reliability``: how well the features of checkpoints and tables repeat in people who were scanned several times."""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.external.adapters import CohortFiles, adapter_files, computed, load_adapters
from evaluation.external.given import Tables, read_tables
from evaluation.protocols.candidates import check_digests, checkpoint_paths
from evaluation.protocols.context import Candidate, EvaluationContext, feature_folder
from evaluation.protocols.protocols import checked_settings
from evaluation.protocols.settings import OWN_LAYER
from evaluation.retest import page
from evaluation.retest.candidates import Sources, block_of, candidates_of, measured_of, unchecked
from evaluation.retest.design import Design, design_of
from evaluation.retest.measure import AGE, Repeats, ageing, measure
from infra.errors import OPTIONAL_TEXT, PATH, TEXT, WHOLE, Kind, UserError, check_arguments
from infra.tracking.tracker import Tracker, store_uri

KIND = "reliability"  # of the MLflow runs


@dataclass(repr=False)
class Reliability:
    """How well candidates repeat, as tables; ``report`` writes them as files. Intervals are 95 % intervals over people.

    Attributes:
        summary: a row per candidate: checkpoint, step, people, scans, scanners, and the metrics of docs/reliability.md.
        icc: a row per candidate, comparison (scanners or repeats) and feature, principal component or prediction: checkpoint,
            step, compared, kind, name, icc21, icc21_low, icc21_high, icc31, icc31_low, icc31_high.
        retest: a row per candidate, comparison and prediction: checkpoint, step, compared, name, unit, sd, sd_low, sd_high,
            difference, difference_low, difference_high.
        shares: a row per candidate and component or prediction: checkpoint, step, kind, name, person, scanner, session, rest.
        simulated: whether the scans are simulated.
        about: lines about the people and scans.
    """

    summary: pd.DataFrame
    icc: pd.DataFrame
    retest: pd.DataFrame
    shares: pd.DataFrame
    simulated: bool
    about: list[str]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by the name of its attribute."""
        return {name: getattr(self, name) for name in ("summary", "icc", "retest", "shares")}

    def report(self, path: str | Path = "reliability.html") -> list[Path]:
        """Write an HTML page to ``path``, and CSV tables, a LaTeX table and a picture beside it; return all paths.

        Raises UserError if ``path`` does not end in .html.
        """
        check_arguments(PATH, path=path)
        return page.write_page(page.Content(self.tables, self.simulated, self.about), Path(path))

    def __repr__(self) -> str:
        """Show what was measured, and the summary."""
        return "\n".join([*self.about, page.summary_text(self.summary).to_string(index=False)])

    def _repr_html_(self) -> str:
        """Show the summary as a table in notebooks."""
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self.about)
        return lines + page.summary_text(self.summary).to_html(index=False)


def reliability(
    checkpoints: Any = None, shards: str | os.PathLike[str] | Manifest | None = None, *, features: Tables | None = None,
    name: str | None = None, encoder: Any = None, cohort: str | os.PathLike[str] | None = None, modality: str | None = None,
    columns: str | os.PathLike[str] | None = None, seen: str | os.PathLike[str] | None = None, voxels: bool = False,
    scanner: str = "site", query: str | None = None, layer: str | None = None, pooling: str | Sequence[str] = ("mean",),
    all_steps: bool = False, seed: int = 0, experiment: str = "yaware", tracking_uri: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Reliability:  # fmt: skip
    """Measure how well features and predictions repeat in people who were scanned several times or on several scanners.

    The people are found in the shards: everybody with more than one scan. Results are logged to MLflow, a run for each
    candidate, where ``compare`` finds them.

    Args:
        checkpoints: one checkpoint or several, as ``evaluate`` takes them. Their readouts are measured too.
        shards: folder or URL of built shards, or their manifest.
        features: tables of features that other software computed, as ``evaluate`` takes them. A column ``predicted_NAME`` is a
            prediction and no feature; ``predicted_age`` is in years.
        name: of the candidate with ``features``; by default that of its file.
        encoder: encoders of others, as ``evaluate`` takes them, applied to the files of ``cohort``.
        cohort: the files for ``encoder``.
        modality: of these files; by default that of the shards.
        columns: YAML file that declares the columns of the cohort's tables.
        seen: file of ``yaware digests`` with the people that the encoders of others, or the software behind the tables, were
            trained on; they are refused.
        voxels: measure also 5,000 voxels, drawn from those that are bright in the mean scan.
        scanner: the column of the shards that tells scanners apart.
        query: pandas query over scans.parquet that selects the scans, for example ``split == "downstream"``.
        layer: use the features of this block inside the encoder.
        pooling: of that block over its voxels.
        all_steps: measure every checkpoint of the given run folders.
        seed: of the drawn voxels, and of the people of the mixed models if there are more than 200.
        experiment: MLflow experiment.
        tracking_uri: MLflow store; by default MLFLOW_TRACKING_URI, else mlruns/mlflow.db.
        cache: folder of computed features; by default that of ``evaluate``.

    Raises:
        UserError: if an argument, a checkpoint or a table cannot be used, if a checkpoint was trained on these people or
            ``seen`` names some of them, or if too few people were scanned more than once.
    """
    check_arguments(TEXT, scanner=scanner, experiment=experiment)
    check_arguments(OPTIONAL_TEXT, query=query, layer=layer, tracking_uri=tracking_uri)
    check_arguments(Kind((bool,), "true or false"), voxels=voxels, all_steps=all_steps)
    check_arguments(WHOLE, seed=seed)
    if shards is None:
        raise UserError("shards is missing; give the folder of built shards")
    no_checkpoint = checkpoints is None or (isinstance(checkpoints, Sequence) and len(checkpoints) == 0)
    if no_checkpoint and features is None and encoder is None and not voxels:
        raise UserError("there is nothing to measure; name checkpoints, a table of features, an encoder or voxels")
    settings = checked_settings(
        tasks=(KIND,), protocols=("linear",), n_train=(100,), seed=seed, finetune=None,
        layer=layer or OWN_LAYER, pooling=pooling, readouts="no",
    )  # fmt: skip
    manifest = shards if isinstance(shards, Manifest) else Manifest.load(os.fspath(shards))
    design = design_of(manifest, scanner=scanner, query=query)
    context = EvaluationContext(
        manifest=manifest, tasks=[], rows=design.rows, settings=settings, cache=feature_folder(manifest, cache),
        storage=Path(), uri=store_uri(tracking_uri), experiment=experiment,
    )  # fmt: skip
    paths = [] if no_checkpoint else checkpoint_paths(checkpoints, all_steps=all_steps)
    given = read_tables(features, name, manifest, common=True, predictions=True)
    given += adapter_files(load_adapters(encoder), CohortFiles(cohort, modality, columns), manifest)
    checked = check_digests(seen, given, context)
    given = computed(given, manifest, design.rows, context.cache)
    candidates = candidates_of(Sources(paths, given, voxels, checked), context)
    about = [design.describe(), *design.notes, *unchecked(candidates)]
    for line in about:
        print(f"reliability: {line}")
    results = []
    for candidate in candidates:
        found = measure(measured_of(candidate, context, seed), design, seed=seed)
        _log(candidate, found, design, context, {"scanner": scanner, "query": query or "", "seed": seed})
        results.append((candidate, found))
    if any((found.retest["name"] == AGE).any() for _, found in results):
        about.append(ageing(design))
        print(f"reliability: {about[-1]}")
    return Reliability(**_tables(results, design), simulated=manifest.simulated, about=about)


def _tables(results: Sequence[tuple[Candidate, Repeats]], design: Design) -> dict[str, pd.DataFrame]:
    """Return the tables of all candidates, each row with checkpoint and step."""
    size = {
        "people": len(set(design.people.tolist())),
        "scans": len(design.rows),
        "scanners": len(design.scanner_names),
    }
    rows = [
        {"checkpoint": candidate.name, "step": candidate.step, **size, **found.summary} for candidate, found in results
    ]
    tables = {"summary": pd.DataFrame(rows)}
    for name in ("icc", "retest", "shares"):
        parts = []
        for candidate, found in results:
            table = getattr(found, name).copy()
            table.insert(0, "checkpoint", candidate.name)
            table.insert(1, "step", candidate.step)
            parts.append(table)
        filled = [part for part in parts if len(part)]
        tables[name] = pd.concat(filled, ignore_index=True) if filled else parts[0]
    return tables


def _log(
    candidate: Candidate, found: Repeats, design: Design, context: EvaluationContext, params: dict[str, Any]
) -> None:  # fmt: skip
    """Log a result as an MLflow run. Raises UserError if the store does not take it."""
    config, manifest = candidate.config, context.manifest
    layer, pooling = block_of(candidate, context)
    tags = {
        "yaware.kind": KIND, "yaware.run_name": candidate.name, "yaware.method": candidate.method,
        "yaware.step": str(candidate.step), "yaware.weights_sha256": candidate.digest,
        "yaware.manifest_digest": manifest.digest, "yaware.simulated": str(manifest.simulated),
        "yaware.pretraining_run": str(config.get("run_id") or ""), "yaware.version": version("yaware"),
        "yaware.layer": layer, "yaware.pooling": pooling,  # as evaluations tag them; compare matches both
        **{f"yaware.{key}": value for key, value in candidate.tags.items()},
    }  # fmt: skip
    if config.get("run_id"):
        tags["mlflow.parentRunId"] = str(config["run_id"])
    title = f"reliability of {candidate.name} step {candidate.step}"
    tracker = Tracker.open(context.uri, context.experiment, title, tags=tags)
    if tracker.run_id is None:
        raise UserError(tracker.fault)
    params = {**params, "layer": layer, "pooling": pooling}
    tracker.log_params({**params, "scans": len(design.rows), "people": len(set(design.people.tolist()))})
    metrics = [(re.sub(r"[^\w.\- /]", "_", key), value, candidate.step) for key, value in found.summary.items()]
    tracker.log_metrics([row for row in metrics if abs(row[1]) < float("inf")])
    with tempfile.TemporaryDirectory() as folder:
        for name in ("icc", "retest", "shares"):
            path = Path(folder) / f"{name}.csv"
            getattr(found, name).to_csv(path, index=False)
            tracker.log_artifact(path, KIND)
    tracker.end()
    if not tracker.stored:
        raise UserError(f"MLflow store {context.uri} has not taken all of the {title}: {tracker.fault}; run it again")
