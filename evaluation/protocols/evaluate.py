"""Evaluates checkpoints on tasks: guards, features, tuned models, metrics with intervals; one MLflow run per result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.external.adapters import CohortFiles, adapter_files, computed, load_adapters
from evaluation.external.given import (
    GivenFeatures,
    Tables,
    check_complete,
    check_values,
    missing_rows,
    read_tables,
)
from evaluation.features.tables import beside, reduced, table_of
from evaluation.protocols.candidates import (
    candidates_by_protocol,
    check_digests,
    check_join,
    checkpoint_paths,
    context_of,
    given_candidates,
    load_checkpoint,
    variant_for,
    variants_of,
)
from evaluation.protocols.context import Candidate, EvaluationContext, feature_folder, print_tasks, search_folder
from evaluation.protocols.finetune import FineTuning
from evaluation.protocols.inputs import add_readouts, candidate_tables, joint_tables, spatial_block_of
from evaluation.protocols.nested_cv import NestedCVResult, prepared_for
from evaluation.protocols.protocols import PROTOCOLS, check_search, checked_settings, decide_readouts
from evaluation.protocols.record import log_result, open_run
from evaluation.protocols.results import (
    EvaluationResult,
    chosen_lines,
    first_metrics_text,
    is_complete,
    make_result,
    metric_rows,
    write_result,
)
from evaluation.protocols.settings import AUTO, EvaluationSettings
from evaluation.tasks.leakage import check_copies
from evaluation.tasks.resamples import NO_RESAMPLING
from evaluation.tasks.tasks import check_names, load_task
from infra import ray_cluster
from infra.errors import UserError
from infra.files import read_text, sha256_of, write_json
from infra.processes.unchanged import unchanged_environment
from infra.search_place import searching
from infra.tracking import runs
from infra.tracking.tracker import store_uri
from pretrain.weights.readouts import readouts_folder

COLUMNS = ["checkpoint", "step", "protocol", "task", "metric", "value", "low", "high", "covers", "run_id"]


@unchanged_environment()
def evaluate(
    checkpoints: Any = None, shards: str | os.PathLike[str] | Manifest | None = None, *, tasks: str | Sequence[str],
    features: Tables | None = None, name: str | None = None, encoder: Any = None,
    cohort: str | os.PathLike[str] | None = None, modality: str | None = None, columns: str | os.PathLike[str] | None = None,
    join: bool = False, common_scans: bool = False, seen: str | os.PathLike[str] | None = None,
    protocols: str | Sequence[str] = ("paper",), folds: int = 5, n_train: Sequence[int] = (100, 300, 500), draws: int = 10,
    seed: int = 0, inner_repeats: int = 1, leave_site_out: bool = False, layer: str | None = None,
    pooling: str | Sequence[str] = ("mean",), scale: str = "each", readouts: str = "auto",
    mlp_trials: int = 12, repeats: int = 3, halvings: int = 10,
    permutations: int = 0, finetune: FineTuning | Mapping[str, Any] | None = None, all_steps: bool = False,
    experiment: str = "yaware", tracking_uri: str | None = None, workers: int | None = None,
    search: str = "auto",
    cache: str | os.PathLike[str] | None = None, storage: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Evaluate checkpoints and tables of features on downstream tasks, log the results to MLflow and return the metrics.

    All candidates are evaluated on the same folds and draws. Nothing is fitted to, or chosen on, test scans. A call that was
    interrupted is continued by the same call: finished trials and results are kept in ``storage`` until all are logged. Ray
    is started for the call and stopped afterwards, unless it is already running.

    Args:
        checkpoints: one checkpoint or several: paths of run folders (their latest checkpoint), ``checkpoints/step-*`` or
            exports, or objects with a ``folder``, such as ``pretrain.Run`` and ``pretrain.Encoder``. None with
            ``features`` alone.
        shards: folder or URL of built shards, or their manifest.
        tasks: names of shipped tasks or paths of YAML files.
        features: a table of features that other software computed (.tsv, .csv, .parquet, .npz or a DataFrame), several whose
            columns are put side by side, or a mapping from a name to such tables for several candidates. Rows name their scan
            by ``key`` or ``participant_id`` (with ``session``, ``run``, ``dataset`` where needed); tables of FreeSurfer and
            CAT12 are read as these programs write them.
        name: of the candidate with ``features``; by default that of its file.
        encoder: an encoder of others, or several: ``package.module:factory``, whose factory returns an adapter, or the adapter
            itself: an object with ``prepare(path)`` -> (1, D, H, W) and ``embed(batch)`` -> (N, F). It is applied to the files
            of ``cohort``. Its code is run.
        cohort: the files for ``encoder``: a cohort as ``read_cohort`` takes it, with the scans of the shards.
        modality: of these files; by default that of the shards.
        columns: YAML file that declares the columns of the cohort's tables.
        join: evaluate each checkpoint also with the features of each table or adapter beside its own, in equal parts of the
            variance.
        common_scans: evaluate all candidates on the scans that every table has. By default missing scans are an error.
        seen: file of ``yaware digests`` with the people that the encoders of others were trained on; they are refused.
        protocols: keys of ``PROTOCOLS``.
        folds: number of outer folds.
        n_train: training-set sizes of learning curves.
        draws: training sets drawn of each size.
        seed: of folds, draws and models.
        inner_repeats: number of shuffles of the inner folds.
        leave_site_out: make folds of whole sites.
        layer: use the features of this block inside the encoder; ``own``: those of the encoder's end; ``auto``: block, pooling
            and scale are chosen on the inner folds of each training set (protocols paper and linear). None: the own features,
            to which paper and linear add spatial ones (but in multiclass tasks): every position of the encoder's deepest map
            of four positions or more along each side; both kinds get the same total variance.
        pooling: of that block over its voxels: mean, max, std, grid2 to grid8, none or several; see ``Encoder.embed``.
        scale: of the features of paper and linear: ``each`` has variance 1, or one scale for ``all``.
        readouts: give the proxies that the encoder's readouts predict to the models of paper and linear, beside the features:
            ``free`` of the penalty, as covariates are, or ``penalised``: with a penalty of their own, chosen on inner folds,
            which may be none; ``no`` does not; ``auto``: free in binary tasks and regressions, if every checkpoint has readouts
            that may be used, else no.
        mlp_trials: settings that Optuna tries for each fold of the protocol mlp.
        repeats: nested cross-validations of all scans, each with other folds, by the protocols on fixed features.
        halvings: random divisions of the participants into halves, each cross-validated, for intervals and tests that
            include the training sets; 0 for none.
        permutations: of the features among participants, each with all models fitted again, for the exact test of
            "better than chance"; each costs as much as the first cross-validation.
        finetune: settings of the protocols finetune and scratch; see ``FineTuning`` for the keys.
        all_steps: evaluate every checkpoint of the given run folders.
        experiment: MLflow experiment.
        tracking_uri: MLflow store; by default MLFLOW_TRACKING_URI, else mlruns/mlflow.db.
        workers: CPUs of the local Ray cluster, at least 1; by default all. With RAY_ADDRESS set, that cluster is used instead.
        search: where the grids of paper, linear, knn and voxels are searched: ``ray``: in Ray Tune; ``here``: in this process;
            ``auto``: in Ray Tune if a cluster is there (RAY_ADDRESS), else here, until the rest would take longer than a start
            of Ray. The results are the same. Networks and perceptrons are always searched in Ray Tune.
        cache: folder of computed features; by default ``.features`` in the shards, or in the user's cache if that is read-only.
        storage: folder of unfinished searches; by default in the user's cache. All nodes of a Ray cluster must see it.

    Returns:
        A row per checkpoint, protocol, task and metric, in the order of evaluation:

        - checkpoint: name of the pretraining run or of the table; ``voxels`` or ``scratch ENCODER`` for a baseline
        - step: pretraining step of the checkpoint; 0 for a table or baseline
        - protocol: key of ``PROTOCOLS``
        - task: name of the task
        - metric: key of ``METRICS`` or ``PROBABILITY_METRICS`` for the kind of the task
        - value: over all test scans; the mean over ``repeats``, as ``compare`` shows it (without halves: of one)
        - low, high: limits of the 95 % interval
        - covers: what the interval covers: ``people and training sets``, or ``people`` if there are no halves
        - run_id: id of the MLflow run with predictions, learning curves and trials

    Raises:
        UserError: if an argument, a checkpoint, the shards or a task cannot be used; if a checkpoint was trained on test
            participants; if the MLflow store did not take a result, which then stays in ``storage``.
    """
    if shards is None:
        raise UserError("shards is missing; give the folder of built shards")
    ray_cluster.check_workers(workers)
    settings = checked_settings(
        tasks=tasks, protocols=protocols, folds=folds, n_train=n_train, draws=draws, seed=seed, inner_repeats=inner_repeats,
        leave_site_out=leave_site_out, layer=layer, pooling=pooling, scale=scale, readouts=readouts, mlp_trials=mlp_trials,
        repeats=repeats, halvings=halvings, permutations=permutations, finetune=finetune,
    )  # fmt: skip
    check_search(search, settings.protocols)
    others_named = features is not None or encoder is not None
    paths = [] if others_named and _none(checkpoints) else checkpoint_paths(checkpoints, all_steps=all_steps)
    manifest = shards if isinstance(shards, Manifest) else Manifest.load(os.fspath(shards))
    given = read_tables(features, name, manifest, common=common_scans)
    given += adapter_files(load_adapters(encoder), CohortFiles(cohort, modality, columns), manifest)
    check_join(settings, given=len(given), checkpoints=len(paths), join=join)
    context = _make_context(
        settings, manifest, store_uri(tracking_uri), experiment, given=given, common=common_scans,
        cache=feature_folder(manifest, cache), storage=search_folder(storage),
    )  # fmt: skip
    checked = check_digests(seen, given, context)
    loaded = [load_checkpoint(path, context) for path in paths]
    given = computed(given, manifest, context.rows, context.cache)
    check_values(given, context.tasks, context.rows)
    others = given_candidates(given, loaded, join=join, checked=checked)
    context = decide_readouts(context, loaded)
    print_tasks(context, variants_of(context, [*loaded, *others]))
    _print_cost(context)
    rows = []
    with searching(search), ray_cluster.session_on_demand(workers):
        for protocol, candidate in candidates_by_protocol(loaded, others, context.settings):
            own = context_of(context, candidate)
            metrics, run_id = _evaluate_once(own, protocol, candidate)
            _print_first_metrics(own, protocol, candidate, metrics)
            rows += metric_rows((candidate.name, candidate.step, protocol), own.tasks, metrics, run_id)
    context.remove_work_folders()
    return pd.DataFrame(rows, columns=COLUMNS)


def _none(checkpoints: Any) -> bool:
    """Whether no checkpoint is given."""
    return checkpoints is None or (isinstance(checkpoints, Sequence) and len(checkpoints) == 0)


def _make_context(
    settings: EvaluationSettings, manifest: Manifest, uri: str, experiment: str, *, cache: Path, storage: Path,
    given: Sequence[GivenFeatures] = (), common: bool = False,
) -> EvaluationContext:  # fmt: skip
    """Load and check the tasks, and the features that were given for their scans.

    With ``common`` the tasks have the scans of which all features were given; else a scan without features is an error.
    """
    check_names(settings.tasks)
    tasks = [load_task(name, manifest, settings.folds) for name in settings.tasks]
    rows = np.unique(np.concatenate([task.rows for task in tasks]))
    lacking = missing_rows(given, rows)
    if lacking.any():
        if not common:
            check_complete(given, manifest, rows)
        print(
            f"evaluate: {int(lacking.sum())} of the {len(rows)} scans of the tasks have no features in some table; all "
            "candidates are evaluated on the others (--common-scans)"
        )
        among = np.setdiff1d(np.arange(len(manifest.scans)), rows[lacking])
        tasks = [load_task(name, manifest, settings.folds, among=among) for name in settings.tasks]
        rows = np.unique(np.concatenate([task.rows for task in tasks]))
    check_copies(tasks, manifest)
    return EvaluationContext(
        manifest=manifest, tasks=tasks, rows=rows, settings=settings,
        cache=cache, storage=storage, uri=uri, experiment=experiment,
    )  # fmt: skip


def _evaluate_once(context: EvaluationContext, name: str, candidate: Candidate) -> tuple[dict[str, float], str]:
    """Evaluate a candidate by a protocol, log the result and return its metrics and MLflow run id.

    What an interrupted call already computed or logged is not repeated. Raises UserError if the store has not taken the
    whole result; it stays in the work folder, and the next call logs it.
    """
    protocol, variant = PROTOCOLS[name], variant_for(name, context, candidate)
    used = protocol.params(context.settings)
    if candidate.given is not None:
        used |= {"features": candidate.given.source, "features_sha256": candidate.given.digest}
    if protocol.uses_joint(context.settings):
        layer, pooling = spatial_block_of(context, candidate) or ("none", ())
        used["spatial"] = " ".join((str(layer), *pooling))
    if protocol.gives_readouts(context.settings) and candidate.folder is not None:
        used["readouts_sha256"] = sha256_of(readouts_folder(candidate.folder) / "checksums.json")
    work = context.work_folder(name, candidate, used)
    logged, run_file, result_folder = work / "metrics.json", work / "run.json", work / "result"
    run_id = json.loads(read_text(run_file))["run_id"] if run_file.exists() else None
    if logged.exists():
        if runs.is_finished(context.uri, str(run_id)):
            return json.loads(read_text(logged)), str(run_id)
        run_id = None  # its run was deleted since, or the whole store: the result is logged again
    params = {"tasks": ",".join(context.settings.tasks), "protocol": name, **used, "scans": len(context.rows)}
    tracker = open_run(context, candidate, variant, params, run_id)
    write_json(run_file, {"run_id": tracker.run_id})
    try:
        if not is_complete(result_folder):
            write_result(compute_result(context, name, candidate, work), result_folder)
        prefix = "" if protocol.plain_names else name
        log_result(tracker, candidate, prefix, context.manifest, result_folder, context.uri)
    except BaseException:
        tracker.end("FAILED")
        raise
    if not tracker.stored:
        if tracker.connected:
            tracker.end("FAILED")  # a run without its tables must not count as finished
        raise UserError(
            f"MLflow store {context.uri} has not taken all of {candidate.name} step {candidate.step}, {variant.label}; the "
            f"result is kept in {result_folder}: fix this and run the same command again: "
            + (tracker.fault or "it rejected a file or a trial, see the warning above")
        )
    metrics: dict[str, float] = json.loads(read_text(result_folder / "metrics.json"))
    write_json(logged, metrics)
    return metrics, str(tracker.run_id)


def compute_result(context: EvaluationContext, name: str, candidate: Candidate, work: Path) -> EvaluationResult:
    """Run nested cross-validation and learning curves of all tasks for one candidate by one protocol.

    ``work`` keeps unfinished searches, which are continued.
    """
    protocol, settings = PROTOCOLS[name], context.settings
    baseline_of_shards = candidate.name == name
    title = name if baseline_of_shards else f"{name} of {candidate.name} step {candidate.step}"
    # First: it computes all features.
    tables = joint_tables(context, candidate) if protocol.uses_joint(settings) else {}
    features, scale = protocol.inputs(context, candidate), protocol.scale_of(settings)
    if not tables:
        columns, count = reduced(features, scale)
        tables = {
            task.name: table_of(task, columns[context.positions_of(task)], scale, count=count) for task in context.tasks
        }
    if candidate.given is not None and candidate.encoder is not None:
        columns = candidate.given.of(context.rows)
        tables = {task.name: beside(tables[task.name], columns[context.positions_of(task)]) for task in context.tasks}
    choices = candidate_tables(context, candidate) if protocol.uses_layer and settings.layer == AUTO else {}
    curve = protocol.learning_curve(settings)
    sizes, resampling = settings.n_train if curve else (), settings.resampling if protocol.resamples else NO_RESAMPLING
    prepared = {
        task.name: prepared_for(
            context.division_of(task, sizes, resampling), tables[task.name], seed=settings.seed,
            repeats=settings.inner_repeats, candidates=choices.get(task.name, ()),
        )
        for task in context.tasks
    }  # fmt: skip
    if protocol.gives_readouts(settings):
        prepared = add_readouts(context, candidate, prepared)
    results = protocol.search(context, candidate, prepared, work, title)
    for line in chosen_lines(results):
        print(f"evaluate: {line}")
    if curve:
        _print_missing_sizes(context, results)
    return make_result(context, results, features[:, protocol.map_features])


def _print_cost(context: EvaluationContext) -> None:
    """Print how many cross-validations the permutations add, and which protocols do not use them."""
    settings = context.settings
    names = [name for name in settings.protocols if PROTOCOLS[name].resamples]
    if settings.permutations and names:
        more = settings.repeats - 1 + settings.halvings
        print(
            f"evaluate: permutations={settings.permutations}: {', '.join(names)}: adds {settings.permutations} "
            f"cross-validations for each task and checkpoint, to {1 + more} without permutations"
        )
    if settings.permutations and len(names) < len(settings.protocols):
        others = [name for name in settings.protocols if name not in names]
        print(f"evaluate: permutations={settings.permutations} is not used by {', '.join(others)}")


def _print_first_metrics(
    context: EvaluationContext, name: str, candidate: Candidate, metrics: Mapping[str, float]
) -> None:
    label, text = variant_for(name, context, candidate).label, first_metrics_text(context.tasks, metrics)
    print(f"evaluate: {candidate.name} step {candidate.step}, {label}: {text}")


def _print_missing_sizes(context: EvaluationContext, results: dict[str, NestedCVResult]) -> None:
    for task in context.tasks:
        missing = sorted(set(context.settings.n_train) - {size for size, _, _ in results[task.name].curve})
        if task.kind == "binary" and missing:
            print(f"evaluate: task {task.name}: too few scans for a learning curve at {', '.join(map(str, missing))}")
