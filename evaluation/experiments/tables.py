"""The experiment's tables, from the stored answers."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from evaluation.experiments.bootstrap import BootstrapMetrics, Cell
from evaluation.experiments.plan import DISEASES, MAIN_CLINIC, ExperimentPlan
from evaluation.statistics.paired import holm

# Methods as the tables name them, in order.
NAMES = {
    "random": "random encoder", "simclr": "SimCLR", "age-regression": "age regression", "y-aware": "y-aware",
    "voxels": "voxel ridge + age", "brain-age": "brain-age score + age", "fine-tuned": "y-aware, fine-tuned",
    "scratch": "from scratch",
}  # fmt: skip
NETWORK_METHODS = ("fine-tuned", "scratch")
WITHOUT_PRETRAINING = ("voxels", "brain-age")
TITLES = {"scz": "schizophrenia", "ad": "Alzheimer's disease"}
SWEEP = {"clinic-a0": 0.0, "clinic-a1": 1.0, "clinic-a2": 2.0}  # clinic -> acceleration of ageing in the disease
# Comparisons of y-aware with age regression: variant of the pretraining, clinic, description.
VARIANTS = [
    ("main", MAIN_CLINIC, "as in the main comparison"), ("cutout", MAIN_CLINIC, "augmentation: cutout alone"),
    ("plain", MAIN_CLINIC, "no augmentation"), ("batch256", MAIN_CLINIC, "batch 256"),
    ("main", "clinic-mixed", "heterogeneous disease"), ("sites", "clinic-sites", "site effects x 3"),
    ("unscaled", "clinic-a1-unscaled", "not divided by TIV"), ("main", "clinic-a0", "disease: pattern alone"),
    ("main", "clinic-a2", "disease: accelerated ageing alone"),
]  # fmt: skip
BANDWIDTHS = (
    (0, "simclr", "main"), (2, "y-aware", "bandwidth2"), (5, "y-aware", "main"), (10, "y-aware", "bandwidth10"),
)  # fmt: skip


def main_table(metrics: BootstrapMetrics, clinic: str, variant: str, plan: ExperimentPlan) -> pd.DataFrame:
    """AUC of every method with its 95 % interval, by task and training size."""
    rows = []
    for task, size in _tasks_and_sizes(plan):
        for method, name in NAMES.items():
            cell = _find_cell(metrics, Cell(clinic, method, variant, task, size))
            if cell is not None:
                seeds, draws = metrics.values[cell].shape
                rows.append((TITLES[task], size, name, seeds, draws, *metrics.mean(cell)))
    return pd.DataFrame(rows, columns=["task", "n_train", "method", "seeds", "draws", "auc", "low", "high"])


def primary_table(metrics: BootstrapMetrics, plan: ExperimentPlan) -> pd.DataFrame:
    """y-aware minus every other method on the main clinic; ``p_holm`` is corrected over all rows."""
    rows = []
    for task, size in _tasks_and_sizes(plan):
        y_aware = Cell(MAIN_CLINIC, "y-aware", "main", task, size)
        for method in ("random", "simclr", "age-regression", *WITHOUT_PRETRAINING, *NETWORK_METHODS):
            other = _find_cell(metrics, Cell(MAIN_CLINIC, method, "main", task, size))
            if other is not None:
                won, draws = metrics.draws_won(y_aware, other)
                difference = metrics.difference(y_aware, other)
                rows.append((TITLES[task], size, NAMES[method], *difference, f"{won} of {draws}"))
    columns = ["task", "n_train", "y-aware minus", "difference", "low", "high", "p", "draws won"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=holm(table["p"].to_numpy(float)))


def sweep_table(metrics: BootstrapMetrics, plan: ExperimentPlan) -> pd.DataFrame:
    """AUC of every method for each acceleration of ageing in the disease."""
    rows = []
    for task, size in _tasks_and_sizes(plan):
        for method, name in NAMES.items():
            if method in NETWORK_METHODS:
                continue
            for clinic, acceleration in SWEEP.items():
                cell = _find_cell(metrics, Cell(clinic, method, "main", task, size))
                if cell is not None:
                    rows.append((TITLES[task], size, name, acceleration, *metrics.mean(cell)))
    return pd.DataFrame(rows, columns=["task", "n_train", "method", "acceleration", "auc", "low", "high"])


def variants_table(metrics: BootstrapMetrics, plan: ExperimentPlan) -> pd.DataFrame:
    """AUC of y-aware and age regression under each variant, and their paired difference."""
    rows = []
    for task, size in _tasks_and_sizes(plan):
        for variant, clinic, description in VARIANTS:
            y_aware, regression = (
                _find_cell(metrics, Cell(clinic, method, variant, task, size))
                for method in ("y-aware", "age-regression")
            )
            if y_aware is not None and regression is not None:
                means = (float(metrics.values[cell].mean()) for cell in (y_aware, regression))
                rows.append((TITLES[task], size, description, *means, *metrics.difference(y_aware, regression)))
    columns = ["task", "n_train", "variant", "y-aware", "age regression", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def bandwidth_table(metrics: BootstrapMetrics, plan: ExperimentPlan) -> pd.DataFrame:
    """AUC of SimCLR (bandwidth 0) and of y-aware for each bandwidth in years, with the first seed of each."""
    rows = []
    for task, size in _tasks_and_sizes(plan):
        for years, method, variant in BANDWIDTHS:
            cell = _find_cell(metrics, Cell(MAIN_CLINIC, method, variant, task, size))
            if cell is not None:
                rows.append((TITLES[task], size, years, float(metrics.values[cell][0].mean())))
    return pd.DataFrame(rows, columns=["task", "n_train", "bandwidth", "auc"])


def age_table(metrics: BootstrapMetrics) -> pd.DataFrame:
    """MAE in years of a ridge probe of age, on healthy people of the test sites."""
    cells = sorted(
        (cell for cell in metrics.values if cell.task == "age"), key=lambda cell: (cell.variant, cell.method)
    )
    rows = [(NAMES[cell.method], cell.variant, metrics.values[cell].shape[0], *metrics.mean(cell)) for cell in cells]
    return pd.DataFrame(rows, columns=["method", "variant", "seeds", "mae", "low", "high"])


def markdown(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of a Markdown table, numbers with three decimals."""
    yield "| " + " | ".join(map(str, table.columns)) + " |"
    yield "|" + "---|" * len(table.columns)
    for row in table.itertuples(index=False):
        yield "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"


def _tasks_and_sizes(plan: ExperimentPlan) -> list[tuple[str, int]]:
    return [(task, size) for task in DISEASES for size in plan.sizes]


def _find_cell(metrics: BootstrapMetrics, cell: Cell) -> Cell | None:
    """Return the cell if it was measured; methods without pretraining have the variant "main" only."""
    if cell.method in WITHOUT_PRETRAINING and cell not in metrics.values:
        cell = cell._replace(variant="main")
    return cell if cell in metrics.values else None
