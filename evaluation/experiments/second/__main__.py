"""Runs the experiment of docs/experiments_2.md on simulated people, whole or in pieces: ``make experiment2``.

    python -m evaluation.experiments.second --list                  # the pieces, and which of them are done
    python -m evaluation.experiments.second --pieces middle         # only these: levels, names, patterns such as */random-*
    python -m evaluation.experiments.second --minutes 180           # start no further piece after three hours
    python -m evaluation.experiments.second --report                # only tables and plots, of what is done

Question, comparisons and analysis were written down before the first run. A finished piece leaves a small file in --results;
with these files a later run, also on a fresh clone, repeats nothing that is done. Answers that belong to another plan or
recipe are not used. A killed run continues when it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from evaluation.experiments.cohorts import is_built, make_cohort, make_shards
from evaluation.experiments.plan_options import add_plan_options, check_plan_file, default_jobs, plan_of
from evaluation.experiments.pretraining import pretrain_command
from evaluation.experiments.processes import Command, Job, run_jobs
from evaluation.experiments.second.evaluate import run_of, shards_of
from evaluation.experiments.second.piece import is_done, piece_command
from evaluation.experiments.second.plan import (
    EXPERIMENT,
    FINE_TUNED,
    LEVELS,
    Piece,
    SecondPlan,
    chosen_pieces,
    pieces_of,
    pretraining_settings,
)
from evaluation.experiments.second.report import write_report
from infra import ray_cluster
from infra.errors import UserError

COMMITTED = Path("docs/benchmarks/experiment2")  # answers of the plan in docs/experiments_2.md


def run(
    out: Path, results: Path, plan: SecondPlan, pieces: Sequence[Piece], *, jobs: int, minutes: float = float("inf")
) -> None:
    """Run pieces that are not done, ``jobs`` at a time, level by level, and write the report.

    Args:
        out: folder for shards, pretrainings, logs and the report.
        results: folder of the answers.
        plan: the experiment's size.
        pieces: some or all of ``pieces_of(plan)``.
        jobs: processes at a time.
        minutes: no piece, and no level's cohort, is started after so many.

    Raises:
        UserError: if the folder holds an experiment with another plan, or a command fails.
    """
    check_plan_file(out, plan)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    start = time.monotonic()

    def may_start() -> bool:
        """Whether there is time for another piece."""
        return time.monotonic() - start < 60 * minutes

    for level in dict.fromkeys(piece.level for piece in pieces):
        waiting = [piece for piece in pieces if piece.level == level and not is_done(results, plan, piece)]
        if waiting and may_start():
            print(f"\n== [{(time.monotonic() - start) / 60:.1f} min] {level}: {len(waiting)} pieces", flush=True)
            _run_level(out, results, plan, waiting, jobs=jobs, may_start=may_start)
    done = [piece for piece in pieces if is_done(results, plan, piece)]
    print(f"\n== [{(time.monotonic() - start) / 60:.1f} min] {len(done)} of {len(pieces)} pieces are done", flush=True)
    write_report(out, results, plan)
    print(f"tables in {out / 'results.md'}, plots beside it", flush=True)


def _run_level(
    out: Path, results: Path, plan: SecondPlan, pieces: Sequence[Piece], *, jobs: int, may_start: Callable[[], bool]
) -> None:
    """Run pieces of one level: first those of encoders and voxels, then the networks, which need a finished pretraining."""
    level = pieces[0].level
    prepare_level(out, plan, level, jobs)
    of_networks = [piece for piece in pieces if piece.kind == "networks"]
    others = [
        Job(piece.name, [*_pretraining(out, plan, piece), piece_command(out, results, plan, piece)])
        for piece in pieces
        if piece not in of_networks
    ]
    if others:
        run_jobs(others, jobs, level, may_start=may_start)
    if of_networks and may_start():
        weights = [Job(f"weights of {FINE_TUNED.name}", _pretraining(out, plan, FINE_TUNED))]
        left_out = run_jobs(weights, 1, level, may_start=may_start)
        networks = [Job(piece.name, [piece_command(out, results, plan, piece)]) for piece in of_networks]
        if not left_out:
            run_jobs(networks, jobs, level, may_start=may_start)


def prepare_level(out: Path, plan: SecondPlan, level: str, jobs: int) -> None:
    """Simulate the healthy people and the clinic of a level and build their shards, unless they are there.

    Raises UserError if people or shards of another simulation are there.
    """
    every = {clinic: shards_of(out, level, clinic=clinic) for clinic in (False, True)}
    with nullcontext() if all(map(is_built, every.values())) else ray_cluster.session(jobs):
        for clinic, shards in every.items():
            cohort = out / "cohorts" / shards.name
            make_cohort(
                cohort, participants=plan.clinic if clinic else plan.healthy, spacing=plan.spacing, seed=plan.seed,
                clinic=clinic, jobs=jobs, differences=LEVELS[level],
            )  # fmt: skip
            make_shards(cohort, shards, scaling="tiv", seed=plan.seed, clinic=clinic, jobs=jobs)


def _pretraining(out: Path, plan: SecondPlan, piece: Piece) -> list[Command]:
    """Return the command that pretrains the encoder of a piece; none if it has no encoder."""
    if piece.kind != "encoder":
        return []
    # Checkpoints now and then: a run that is killed without a warning loses little.
    overrides = (f"--checkpoint.every_steps={max(1, plan.steps // 4)}", *piece.overrides)
    return [pretrain_command(
        run_of(out, piece), shards=shards_of(out, piece.level, clinic=False), steps=plan.steps,
        seed=plan.seed + piece.seed, experiment=EXPERIMENT, settings=pretraining_settings(plan, piece), overrides=overrides,
    )]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m evaluation.experiments.second`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.experiments.second", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("experiment2"), help="folder of the experiment")
    parser.add_argument(
        "--results", type=Path,
        help=f"folder of the answers (default: {COMMITTED} for the plan of docs/experiments_2.md, else OUT/answers)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, help="processes at a time (default: one per core, or 1 on a GPU)")
    parser.add_argument("--pieces", help="run only these, separated by commas: levels, names or patterns")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further piece after so many")
    parser.add_argument("--list", action="store_true", help="list the pieces, and end")
    parser.add_argument("--report", action="store_true", help="write tables and plots of what is done, and end")
    add_plan_options(parser, SecondPlan)
    options = parser.parse_args(arguments)
    try:
        plan = plan_of(options, SecondPlan)
        results = options.results or (COMMITTED if plan == SecondPlan() else options.out / "answers")
        pieces = pieces_of(plan) if options.pieces is None else chosen_pieces(plan, options.pieces)
        if options.list:
            for piece in pieces:
                state = "done" if is_done(results, plan, piece) else "stale" if piece.file(results).exists() else "open"
                print(f"{state}\t{piece.name}")
        elif options.report:
            check_plan_file(options.out, plan)
            write_report(options.out, results, plan)
        else:
            run(options.out, results, plan, pieces, jobs=options.jobs or default_jobs(), minutes=options.minutes)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
