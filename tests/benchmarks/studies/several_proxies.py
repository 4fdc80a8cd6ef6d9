"""Does a loss that attracts scans of the same age, sex and head size (a product of kernels) serve better than age alone?

    python -m tests.benchmarks.studies.several_proxies OUT [--seeds 21,22,23,24] [--participants 2000] [--steps 300]

For every seed a cohort of the middle level of realism is simulated and an encoder pretrained as in
``tests.benchmarks.studies.default_features``, whose OUT can be given: what is finished there is not repeated. A second one is
trained in the same way with the proxies age, sex and TIV. Both are evaluated on the downstream people by nested
cross-validation (protocol ``linear``, own and spatial features, no readouts). Printed for each task: the means over the seeds,
their difference, and its range over the seeds. Three minutes a seed on one core, and three more for a new cohort.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import evaluation
from evaluation.experiments.second.plan import MIDDLE
from evaluation.experiments.tables import markdown
from infra import cli
from tests.benchmarks.studies.default_features import prepare_cohort

PROXIES = (
    "age: {kernel: gaussian, bandwidth: 5.0}", "sex: {kernel: same}", "tiv: {kernel: gaussian, bandwidth: 150.0}",
)  # fmt: skip
SEVERAL = f"--loss.proxies={{{', '.join(PROXIES)}}}"
TASKS = {"ad": "auc", "scz": "auc", "age": "mae", "sex": "auc"}


def measure(out: Path, seed: int, participants: int, steps: int) -> pd.DataFrame:
    """Return a row for each encoder and task of a seed."""
    folder = prepare_cohort(out, seed, participants, level=MIDDLE, steps=steps)
    uri = f"sqlite:///{folder}/mlflow.db"
    command = [
        "pretrain", "--config", "simulated-6mm", f"--run.seed={seed}", "--run.name=several", f"--run.tracking_uri={uri}",
        f"--data.shards={folder / 'shards'}", f"--run.output={folder / 'several'}", f"--train.steps={steps}", SEVERAL,
    ]  # fmt: skip
    if cli.run(command):  # a finished run ends at once
        raise SystemExit("several_proxies: pretrain failed")
    table = evaluation.evaluate(
        [folder / "y-aware", folder / "several"], folder / "shards", tasks=list(TASKS), protocols="linear", readouts="no",
        repeats=1, halvings=0, experiment="several-proxies", tracking_uri=uri, search="here",
    )  # fmt: skip
    table = table[table["metric"] == table["task"].map(TASKS)]
    return table[["checkpoint", "task", "metric", "value"]].assign(seed=seed)


def report(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each task: means over the seeds, and their difference with its range."""
    rows = []
    for task, metric in TASKS.items():
        cells = scores[scores["task"] == task].pivot_table("value", "seed", "checkpoint")
        change = cells["several"] - cells["y-aware"]
        rows.append({
            "task": f"{task}, {metric}", "age": f"{cells['y-aware'].mean():.3f}",
            "age, sex and TIV": f"{cells['several'].mean():.3f}", "difference": f"{change.mean():+.3f}",
            "range over the seeds": f"{change.min():+.3f} to {change.max():+.3f}",
        })  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table of ``report``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="21,22,23,24")
    parser.add_argument("--participants", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    out = options.out.resolve()
    scores = pd.concat([measure(out, seed, options.participants, options.steps) for seed in seeds])
    print("\n".join(markdown(report(scores))))


if __name__ == "__main__":
    main()
