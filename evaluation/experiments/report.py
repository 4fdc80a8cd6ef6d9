"""The experiment's tables and pictures, from the stored answers alone.

A figure is the mean AUC over pretraining seeds and draws of the training set. Its interval is a bootstrap over all three
sources of chance at once: test people, draws and seeds are each drawn with replacement. Two subjects are compared on the
same people, draws and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from evaluation.comparison.plots import LINES, MARKERS, PALETTE, REFERENCE, pyplot
from evaluation.experiments.judge import DISEASES, Answered, load
from evaluation.statistics.intervals import bootstrap_weights, participant_codes
from evaluation.statistics.metrics import auc, mae
from evaluation.statistics.paired import holm
from infra import random_streams
from infra.files import atomic_write

if TYPE_CHECKING:
    from evaluation.experiments.run import Plan

Array = np.ndarray[Any, np.dtype[Any]]
MAIN = "clinic-a1"
# As the tables name them, in their order.
NAMES = {
    "random": "random encoder", "simclr": "SimCLR", "age-regression": "age regression", "y-aware": "y-aware",
    "voxels": "voxel ridge + age", "brain-age": "brain-age score + age", "fine-tuned": "y-aware, fine-tuned",
    "scratch": "from scratch",
}  # fmt: skip
TITLES = {"scz": "schizophrenia", "ad": "Alzheimer's disease"}
SWEEP = {"clinic-a0": 0.0, "clinic-a1": 1.0, "clinic-a2": 2.0}
# What is compared with age regression, and where: variant of the pretraining, clinic, in words.
VARIANTS = [
    ("main", MAIN, "as in the main comparison"), ("cutout", MAIN, "augmentation: cutout alone"),
    ("plain", MAIN, "no augmentation"), ("batch256", MAIN, "batch 256"),
    ("main", "clinic-mixed", "heterogeneous disease"), ("sites", "clinic-sites", "site effects x 3"),
    ("unscaled", "clinic-a1-unscaled", "not divided by TIV"), ("main", "clinic-a0", "disease: pattern alone"),
    ("main", "clinic-a2", "disease: accelerated ageing alone"),
]  # fmt: skip


class Key(NamedTuple):
    """One figure: whose, where, on what, with how many labelled scans."""

    clinic: str
    method: str
    variant: str
    task: str
    size: int


class Figures:
    """Every figure with its bootstrap sample; samples of two keys of one clinic and task are paired."""

    def __init__(self, found: list[Answered], resamples: int, seed: int) -> None:
        self._resamples, self._seed = resamples, seed
        self.values: dict[Key, Array] = {}  # (seeds, draws)
        self._weighted: dict[Key, Array] = {}  # (seeds, draws, resamples)
        people: dict[tuple[str, str], Array] = {}
        grouped: dict[Key, list[tuple[Answered, int]]] = {}
        for each in sorted(found, key=lambda each: each.seed):
            for size in np.unique(each.sizes):
                key = Key(each.clinic, each.method, each.variant, each.task, int(size))
                grouped.setdefault(key, []).append((each, int(size)))
        for key, answered in grouped.items():
            figure = auc if key.task in DISEASES else mae
            first = answered[0][0]
            weights = people.setdefault(
                (key.clinic, key.task),
                np.concatenate(list(bootstrap_weights(participant_codes(first.people), resamples, seed))),
            )
            rows = [each.answers[each.sizes == size] for each, size in answered]
            self.values[key] = np.array([[figure(first.labels, row) for row in part] for part in rows])
            self._weighted[key] = np.array([[figure(first.labels, row, weights) for row in part] for part in rows])

    def sample(self, key: Key, draws: int) -> Array:
        """(resamples,) means over seeds and the first ``draws`` draws, each drawn with replacement."""
        weighted = self._weighted[key][:, :draws]
        seeds, count, _ = weighted.shape
        of_seeds, of_draws = (self._counts(n, purpose) for n, purpose in ((seeds, "seeds"), (count, "draws")))
        return np.asarray(np.einsum("sdb,bs,bd->b", weighted, of_seeds, of_draws) / (seeds * count))

    def _counts(self, number: int, purpose: str) -> Array:
        """(resamples, number) times that each is drawn; the same for the same number, which pairs subjects."""
        generator = random_streams.generator(self._seed, random_streams.named_stream(f"{purpose}{number}"))
        return generator.multinomial(number, np.full(number, 1 / number), size=self._resamples)

    def one(self, key: Key) -> tuple[float, float, float]:
        """Mean, low, high."""
        draws = self.values[key].shape[1]
        return float(self.values[key].mean()), *_limits(self.sample(key, draws))

    def difference(self, first: Key, second: Key) -> tuple[float, float, float, float]:
        """First less second, low, high, two-sided p; over the draws that both have, each over all of its seeds.

        Seeds are paired where both have as many. The least p that there can be is 2 / (resamples + 1).
        """
        draws = min(self.values[key].shape[1] for key in (first, second))
        value = float(self.values[first][:, :draws].mean() - self.values[second][:, :draws].mean())
        gaps = self.sample(first, draws) - self.sample(second, draws)
        p = 2 * (min(int((gaps <= 0).sum()), int((gaps >= 0).sum())) + 1) / (len(gaps) + 1)
        return value, *_limits(gaps), min(1.0, p)


def _limits(sample: Array) -> tuple[float, float]:
    low, high = np.quantile(sample, [0.025, 0.975])
    return float(low), float(high)


def write_report(out: Path, plan: Plan) -> None:
    """results.md, the tables as .csv and the pictures, beside the stored answers."""
    found = [each for path in sorted((out / "results").glob("*.npz")) for each in load(path)]
    figures = Figures(found, plan.resamples, plan.seed)
    tables = {
        "main": main_table(figures, MAIN, "main", plan),
        "unscaled": main_table(figures, "clinic-a1-unscaled", "unscaled", plan),
        "primary": primary_table(figures, plan), "sweep": sweep_table(figures, plan),
        "variants": variants_table(figures, plan), "bandwidth": bandwidth_table(figures, plan), "age": age_table(figures),
    }  # fmt: skip
    lines = [f"Plan: {plan}", ""]
    for name, table in tables.items():
        with atomic_write(out / f"{name}.csv", "w") as stream:
            table.to_csv(stream, index=False)
        lines += [f"## {name}", "", *markdown(table), ""]
    people = {(each.clinic, each.task): len(np.unique(each.people)) for each in found}
    lines += ["Test people: " + ", ".join(f"{clinic} {task} {count}" for (clinic, task), count in people.items()), ""]
    with atomic_write(out / "results.md", "w") as stream:
        stream.write("\n".join(lines))
    pictures = {"main": picture_main, "sweep": picture_sweep, "variants": picture_variants}
    for name, picture in pictures.items():
        figure = picture(tables[name])
        with atomic_write(out / f"experiment_{name}.png") as stream:
            figure.savefig(stream, format="png", dpi=110)


def main_table(figures: Figures, clinic: str, variant: str, plan: Plan) -> pd.DataFrame:
    """AUC of every method with its interval, by task and training size."""
    rows = []
    for task in DISEASES:
        for size in plan.sizes:
            for method, name in NAMES.items():
                key = _key(figures, clinic, method, variant, task, size)
                if key is not None:
                    seeds, draws = figures.values[key].shape
                    rows.append((TITLES[task], size, name, seeds, draws, *figures.one(key)))
    return pd.DataFrame(rows, columns=["task", "n_train", "method", "seeds", "draws", "auc", "low", "high"])


def primary_table(figures: Figures, plan: Plan) -> pd.DataFrame:
    """y-aware less every other method in the main clinic; p corrected by Holm over all rows."""
    rows = []
    for task in DISEASES:
        for size in plan.sizes:
            mine = Key(MAIN, "y-aware", "main", task, size)
            for method in ("random", "simclr", "age-regression", "voxels", "brain-age", "fine-tuned", "scratch"):
                other = _key(figures, MAIN, method, "main", task, size)
                if other is not None:
                    wins = _draws_won(figures, mine, other)
                    rows.append((TITLES[task], size, NAMES[method], *figures.difference(mine, other), wins))
    columns = ["task", "n_train", "y-aware less", "difference", "low", "high", "p", "draws won"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(p_holm=holm(table["p"].to_numpy(float)))


def _draws_won(figures: Figures, first: Key, second: Key) -> str:
    """In how many draws the first's mean over seeds is higher."""
    one, other = (figures.values[key].mean(0) for key in (first, second))
    count = min(len(one), len(other))
    return f"{int((one[:count] > other[:count]).sum())} of {count}"


def sweep_table(figures: Figures, plan: Plan) -> pd.DataFrame:
    """AUC over the share of accelerated ageing in the disease."""
    rows = []
    for task in DISEASES:
        for size in plan.sizes:
            for method, name in NAMES.items():
                for clinic, acceleration in SWEEP.items():
                    key = _key(figures, clinic, method, "main", task, size)
                    if key is not None and method not in ("fine-tuned", "scratch"):
                        rows.append((TITLES[task], size, name, acceleration, *figures.one(key)))
    return pd.DataFrame(rows, columns=["task", "n_train", "method", "acceleration", "auc", "low", "high"])


def variants_table(figures: Figures, plan: Plan) -> pd.DataFrame:
    """y-aware and age regression under each variant, and their paired difference."""
    rows = []
    for task in DISEASES:
        for size in plan.sizes:
            for variant, clinic, says in VARIANTS:
                one, other = (
                    _key(figures, clinic, method, variant, task, size) for method in ("y-aware", "age-regression")
                )
                if one is not None and other is not None:
                    value, low, high, p = figures.difference(one, other)
                    means = (float(figures.values[key].mean()) for key in (one, other))
                    rows.append((TITLES[task], size, says, *means, value, low, high, p))
    columns = ["task", "n_train", "variant", "y-aware", "age regression", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def bandwidth_table(figures: Figures, plan: Plan) -> pd.DataFrame:
    """AUC of SimCLR (0 years) and of y-aware by bandwidth, the first seed of each."""
    rows = []
    for task in DISEASES:
        for size in plan.sizes:
            for years, method, variant in (
                (0, "simclr", "main"), (2, "y-aware", "bandwidth2"), (5, "y-aware", "main"), (10, "y-aware", "bandwidth10"),
            ):  # fmt: skip
                key = _key(figures, MAIN, method, variant, task, size)
                if key is not None:
                    rows.append((TITLES[task], size, years, float(figures.values[key][0].mean())))
    return pd.DataFrame(rows, columns=["task", "n_train", "bandwidth", "auc"])


def age_table(figures: Figures) -> pd.DataFrame:
    """MAE of a ridge probe of age on people of sites that it was not fitted to."""
    rows = []
    for key in sorted((key for key in figures.values if key.task == "age"), key=lambda key: (key.variant, key.method)):
        rows.append((NAMES[key.method], key.variant, figures.values[key].shape[0], *figures.one(key)))
    return pd.DataFrame(rows, columns=["method", "variant", "seeds", "mae", "low", "high"])


def _key(figures: Figures, clinic: str, method: str, variant: str, task: str, size: int) -> Key | None:
    """The key if it was measured; baselines without pretraining have no variants."""
    for name in (variant, "main"):
        key = Key(clinic, method, name, task, size)
        if key in figures.values and (name == variant or method in ("voxels", "brain-age")):
            return key
    return None


def markdown(table: pd.DataFrame) -> Iterator[str]:
    """A table's lines, numbers to three places."""
    yield "| " + " | ".join(map(str, table.columns)) + " |"
    yield "|" + "---|" * len(table.columns)
    for row in table.itertuples(index=False):
        yield "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"


def picture_main(table: pd.DataFrame) -> Any:
    """A panel for each task and training size, a line for each method."""
    plt = pyplot()
    sizes, methods = (
        sorted(table["n_train"].unique()),
        [name for name in NAMES.values() if name in set(table["method"])],
    )
    figure, axes = plt.subplots(
        len(DISEASES), len(sizes), figsize=(9.6, 6.4), sharey=True, sharex="row", squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, DISEASES, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            part = table[(table["task"] == TITLES[task]) & (table["n_train"] == size)].set_index("method")
            for place, method in enumerate(methods):
                if method not in part.index:
                    axis.text(0.98, place, "not measured", transform=axis.get_yaxis_transform(), ha="right", va="center",
                              color=REFERENCE, fontsize=9)  # fmt: skip
                else:
                    _bar(axis, part.loc[method], "auc", place, PALETTE[1] if method == NAMES["y-aware"] else PALETTE[2])
            axis.set_yticks(range(len(methods)), methods)
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.set_title(f"{TITLES[task]}, {size} labelled scans")
            axis.set_xlabel("AUC on held-out sites, 95 % interval")
    return figure


def picture_sweep(table: pd.DataFrame) -> Any:
    """AUC over the share of accelerated ageing."""
    plt = pyplot()
    sizes, methods = (
        sorted(table["n_train"].unique()),
        [name for name in NAMES.values() if name in set(table["method"])],
    )
    figure, axes = plt.subplots(len(DISEASES), len(sizes), figsize=(9.6, 6.6), squeeze=False, layout="constrained")
    for row, task in zip(axes, DISEASES, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            for number, method in enumerate(methods):
                part = table[(table["task"] == TITLES[task]) & (table["n_train"] == size) & (table["method"] == method)]
                axis.plot(part["acceleration"], part["auc"], label=method, color=PALETTE[number % 7], ms=5,
                          marker=MARKERS[number % 7], ls=LINES[number % 7])  # fmt: skip
            axis.set_title(f"{TITLES[task]}, {size} labelled scans")
            axis.set_xticks(list(SWEEP.values()), ["pattern\nalone", "both", "accelerated\nageing alone"])
            axis.set_ylabel("AUC on held-out sites")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def picture_variants(table: pd.DataFrame) -> Any:
    """The difference of y-aware and age regression under each variant."""
    plt = pyplot()
    sizes, variants = sorted(table["n_train"].unique()), list(dict.fromkeys(table["variant"]))
    figure, axes = plt.subplots(
        len(DISEASES), len(sizes), figsize=(9.6, 6.8), sharey=True, sharex=True, squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, DISEASES, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            part = table[(table["task"] == TITLES[task]) & (table["n_train"] == size)].set_index("variant")
            axis.axvline(0, color=REFERENCE, ls="--", lw=1)
            for place, variant in enumerate(variants):
                if variant in part.index:
                    _bar(axis, part.loc[variant], "difference", place, PALETTE[0])
            axis.set_yticks(range(len(variants)), variants)
            axis.set_ylim(len(variants) - 0.5, -0.5)
            axis.set_title(f"{TITLES[task]}, {size} labelled scans")
    for axis in axes[-1]:
        axis.set_xlabel("AUC of y-aware less age regression")
        axis.locator_params(axis="x", nbins=5)
    return figure


def _bar(axis: Any, row: Any, column: str, place: int, color: str) -> None:
    value = row[column]
    error = [[value - row["low"]], [row["high"] - value]]
    axis.errorbar(value, place, xerr=np.maximum(error, 0), marker="o", ms=5, capsize=3, lw=1.4, color=color)
