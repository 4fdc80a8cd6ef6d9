"""Run the sides of a row in turns, each in a new process, and repeat a row whose seconds vary too much."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.processes.with_parent import command_with_parent
from tests.benchmarks.harness.case import MARK
from tests.benchmarks.harness.row import ROUND, Row, Side
from tests.benchmarks.harness.statistics import spread_of

ROOT = Path(__file__).resolve().parents[3]
MAX_SPREAD = 0.15  # (largest - smallest) / median of the compared seconds of a side's rounds
TIMEOUT_S = 1800
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
ITK_THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"  # of TorchIO and nidl, which resample with SimpleITK
Result = dict[str, Any]


class CaseFailed(Exception):
    """A case ended with an error; the text is its last line."""


def run_case(python: str, case: str, arguments: Mapping[str, Any], threads: int) -> Result:
    """Run a case with an interpreter and a number of threads; return its result.

    Raises:
        CaseFailed: with the last line of the error, if the process fails.
    """
    command = [python, "-m", "tests.benchmarks.harness.case", case, json.dumps(arguments)]
    variables = {
        **os.environ,
        **dict.fromkeys((*THREADS, ITK_THREADS), str(threads)),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    try:
        done = subprocess.run(
            command_with_parent(command), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise CaseFailed(f"no result within {TIMEOUT_S} s") from None
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line or "error" in line), None)
        raise CaseFailed(reason or (lines[-1] if lines else f"ended with status {done.returncode} and no output"))
    result: Result = json.loads(marked[-1].removeprefix(MARK))
    return result


def run_row(
    row: Row,
    run: Callable[[Side], Result],
    *,
    errors: Mapping[str, str] | None = None,
    repeat: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Measure a row; return its attempts, the number of the best one, and the error of each side that failed.

    In every round each side runs once; the order is reversed from round to round. If the spread of an attempt is above
    MAX_SPREAD, the row is measured again, at most ``row.repeats`` times; the attempt with the smallest spread counts.

    Args:
        row: the row.
        run: runs a side and returns its result; raises CaseFailed.
        errors: sides that cannot run, and why.
        repeat: whether there is still time to measure a row again.
    """
    failed = dict(errors or {})
    attempts: list[dict[str, Any]] = []
    started = time.perf_counter()
    while not attempts or (attempts[-1]["spread"] > MAX_SPREAD and len(attempts) <= row.repeats and repeat()):
        before, rounds = os.getloadavg()[0], []
        for number in range(row.rounds):
            found: dict[str, Result] = {}
            for side in row.sides[:: -1 if number % 2 else 1]:
                if side.name in failed:
                    continue
                try:
                    found[side.name] = run(_of_round(side, number))
                except CaseFailed as error:
                    failed[side.name] = str(error)
            rounds.append(found)
        rounds = [{name: result for name, result in found.items() if name not in failed} for found in rounds]
        attempts.append(
            {"load": [before, os.getloadavg()[0]], "spread": spread_of(rounds, row.metric), "rounds": rounds}
        )
    best = min(range(len(attempts)), key=lambda n: attempts[n]["spread"])
    return {
        **row.description(), "attempts": attempts, "chosen": best, "noisy": attempts[best]["spread"] > MAX_SPREAD,
        "errors": failed, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _of_round(side: Side, number: int) -> Side:
    """Return the side with the number of a round in place of ROUND."""
    arguments = {name: number if value == ROUND else value for name, value in side.arguments.items()}
    return replace(side, arguments=arguments)
