"""What the default of ``yaware evaluate`` gains on the encoders of docs/experiments_2.md, which it was not set on.

    python -m tests.benchmarks.studies.default_on_experiment OUT [--levels middle,easy,hard] [--seeds 3]

OUT is the folder of ``make experiment2`` with its shards and encoders. On each y-aware encoder the present default is fitted to
the training sets of the experiment and compared with features whose answers are committed: pooled ones, the default at that
time, and spatial ones with readout. The table has AUC, and differences with 95 % intervals over test people, training sets and
encoders, uncorrected. It takes about one minute an encoder on an idle core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from evaluation.experiments.bootstrap import BootstrapMetrics, Cell
from evaluation.experiments.plan import DISEASES
from evaluation.experiments.second.comparisons import FEATURE_TITLES
from evaluation.experiments.second.evaluate import Clinic
from evaluation.experiments.second.plan import FEATURES, LEVELS, Piece, SecondPlan
from evaluation.experiments.second.store import load_piece
from evaluation.experiments.tables import markdown

COMMITTED = Path("docs/benchmarks/experiment2")
METHOD, PRESENT = "y-aware", "default since"
TITLES = FEATURE_TITLES | {"default": "default at that time", PRESENT: "default since then"}


def compare(out: Path, plan: SecondPlan, levels: list[str], seeds: int) -> pd.DataFrame:
    """Return AUC of each kind of features, and what PRESENT has more than it, by level: (levels x 5 rows)."""
    rows = []
    for level in levels:
        pieces = [Piece(level, "encoder", METHOD, seed) for seed in range(seeds)]
        stored = [entry for piece in pieces for entry in load_piece(piece.file(COMMITTED))]
        answers = [entry for entry in stored if entry.task in DISEASES and entry.variant in FEATURES]
        clinic = Clinic(out, plan, level)
        for piece in pieces:
            answers += [entry for entry in clinic.encoder_answers(piece, [PRESENT]) if entry.task in DISEASES]
        metrics = BootstrapMetrics(answers, plan.resamples, plan.seed)
        for kind in (*FEATURES, PRESENT):
            row: dict[str, object] = {"level": level, "features": TITLES[kind]}
            for task in DISEASES:
                for size in plan.sizes:
                    cell, present = (Cell(level, METHOD, name, task, size) for name in (kind, PRESENT))
                    row[f"{task}, {size}"] = f"{metrics.mean(cell)[0]:.3f}"
                    if kind != PRESENT:
                        value, low, high, _ = metrics.difference(present, cell)
                        row[f"{task}, {size}"] += f" ({value:+.3f} [{low:.3f}, {high:.3f}])"
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table of ``compare``; in brackets: the present default minus the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table = compare(options.out.resolve(), SecondPlan(), options.levels.split(","), options.seeds)
    print("\n".join(markdown(table)))


if __name__ == "__main__":
    main()
