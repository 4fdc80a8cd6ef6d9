"""Draw the figures of docs/loss.md and print its numbers: `python docs/figures/loss_plots.py`, a minute on two cores.

Ages are simulated from the published description of the pretraining cohort (7,764 healthy people of 74 sites, age
32 ± 19 years). Each site has its own mean and spread. Nothing here is measured on real scans.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from pretrain.kernels import KERNELS
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.losses.diagnostics import effective_positives

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"
BATCH = 256


def site_ages(people: int = 7764, sites: int = 74, seed: int = 0) -> np.ndarray:
    """Simulate ages from 6 to 88, mean 32, SD 19: most sites have young adults, some children, some elderly people."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, size=sites, p=[0.16, 0.60, 0.24])
    means = np.choose(kinds, [rng.normal(11, 2, sites), rng.normal(25, 4, sites), rng.normal(62, 9, sites)])
    spreads = np.choose(kinds, [rng.uniform(1.5, 3, sites), rng.uniform(3, 9, sites), rng.uniform(6, 12, sites)])
    of_site = rng.choice(sites, size=people, p=rng.dirichlet(np.full(sites, 1.5)))
    ages = rng.normal(means[of_site], spreads[of_site])
    ages = (ages - ages.mean()) / ages.std() * 19.0 + 32.0
    return np.clip(ages, 6.0, 88.0)


def batch_of(ages: np.ndarray, scans: int, seed: int) -> Tensor:
    """Draw the ages (B, 1) of a batch."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice(ages, size=scans, replace=False))[:, None]


def column_row_sums(ages: Tensor, sigma: float) -> Tensor:
    """Return (B,): the sum of an anchor's weights with the published normalisation; with the paper's formula it is 1."""
    weights = KERNELS["gaussian"](bandwidth=sigma)(ages, ages)
    sums = 2.0 * weights.sum(dim=0) - 1.0
    return 2.0 * (weights / sums).sum(dim=1) - 1.0 / sums


def age_embeddings(ages: Tensor, seed: int, depth: int = 128) -> Tensor:
    """Return random embeddings (2, B, D) that depend partly and smoothly on age, like those of a half-trained encoder."""
    source = torch.Generator().manual_seed(seed)
    phase = torch.outer(ages[:, 0], torch.linspace(0.02, 0.2, depth, dtype=torch.float64))
    noise = torch.randn(2, len(ages), depth, generator=source, dtype=torch.float64)
    return (torch.cos(phase) + 0.7 * noise).requires_grad_()


def gradient_difference(ages: Tensor, seed: int) -> tuple[float, float]:
    """Return the cosine and the relative difference of the gradients of both normalisations, with the column form halved."""
    views, kernel = age_embeddings(ages, seed), KERNELS["gaussian"](bandwidth=5.0)
    row, column = (
        torch.autograd.grad(y_aware_infonce(views, ages, kernel=kernel, normalization=form), views)[0].flatten()
        for form in ("row", "column")
    )
    column = column / 2.0
    return (row @ column / (row.norm() * column.norm())).item(), ((row - column).norm() / row.norm()).item()


def style(axes: plt.Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, and remove the upper and right border."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, name: str) -> None:
    """Save a figure beside this file and close it."""
    figure.tight_layout()
    figure.savefig(FOLDER / name, dpi=130)
    plt.close(figure)


def plot_kernels() -> None:
    """Draw every continuous kernel as a function of the difference of two proxies."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    difference = torch.linspace(0.0, 25.0, 501, dtype=torch.float64)[:, None]
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for name, width, colour in (
        ("gaussian", 5.0, BLUE), ("cauchy", 5.0, ORANGE), ("exponential", 5.0, GREEN),
        ("epanechnikov", 10.0, GREY), ("linear", 10.0, "#805ad5"), ("cosine", 10.0, "#b83280"),
    ):  # fmt: skip
        weights = KERNELS[name](bandwidth=width)(difference, zero)[:, 0]
        axes.plot(difference[:, 0], weights, color=colour, label=f"{name}, bandwidth {width:g}")
    style(axes, "Weight of a pair of scans", "age difference (years)", "w")
    axes.legend(frameon=False, fontsize=9)
    save(figure, "loss_kernels.png")


def plot_normalisation(ages: np.ndarray) -> None:
    """Draw the weight of an anchor by its age, for row and column normalisation; print the gradients' difference."""
    batches = [batch_of(ages, BATCH, seed) for seed in range(20)]
    sums = torch.cat([column_row_sums(batch, 5.0) for batch in batches])
    flat = torch.cat(batches)[:, 0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    left.hist(ages, bins=np.arange(6, 90, 2), color=GREY)
    style(left, "Simulated ages of 74 sites", "age (years)", "people")
    right.scatter(flat, sums, s=3, alpha=0.4, color=ORANGE, label='"column", as published', linewidths=0)
    right.axhline(1.0, color=BLUE, label='"row", the formula')
    right.set_ylim(0)
    style(right, f"Weight of an anchor in the loss (batch {BATCH}, σ = 5)", "age (years)", "sum of its weights")
    right.legend(frameon=False, fontsize=9, markerscale=4)
    save(figure, "loss_normalisation.png")
    differences = [gradient_difference(batch, seed) for seed, batch in enumerate(batches)]
    cosine, relative = np.mean(differences, axis=0)
    low, high = np.quantile(sums, [0.0, 1.0])
    print(f"ages {ages.mean():.1f} ± {ages.std():.1f}; sums of the column-normalised rows {low:.2f} to {high:.2f}")
    print(f"gradients, column (halved) against row, batch {BATCH}: cosine {cosine:.3f}, difference {relative:.0%}")


def plot_positives(ages: np.ndarray) -> None:
    """Draw the effective positives by bandwidth and batch size, and print them for σ = 5."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    widths = np.geomspace(0.1, 30, 25)
    for scans, colour in ((16, GREY), (64, GREEN), (256, BLUE), (1024, ORANGE)):
        per_width = [
            torch.cat(
                [effective_positives(batch_of(ages, scans, s), KERNELS["gaussian"](bandwidth=w)) for s in range(4)]
            )
            for w in widths
        ]
        left.plot(widths, [values.median().item() for values in per_width], color=colour, label=f"batch {scans}")
        right.plot(widths, [(values < 2).double().mean().item() for values in per_width], color=colour)
        if scans in (16, 64, 256):
            five = torch.cat(
                [effective_positives(batch_of(ages, scans, s), KERNELS["gaussian"](bandwidth=5.0)) for s in range(20)]
            )
            few = (five < 2).double().mean()
            print(f"batch {scans}, σ = 5: median {five.median():.1f} effective positives, {few:.1%} of anchors below 2")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.axvline(5.0, color="black", linewidth=0.6, linestyle=":")
    left.set_yscale("log")
    style(left, "Effective positives of an anchor (median)", "gaussian bandwidth σ (years)", "positives")
    style(right, "Anchors with fewer than 2 effective positives", "gaussian bandwidth σ (years)", "share")
    left.legend(frameon=False, fontsize=9)
    save(figure, "loss_positives.png")


def main() -> None:
    """Draw all figures."""
    ages = site_ages()
    plot_kernels()
    plot_normalisation(ages)
    plot_positives(ages)


if __name__ == "__main__":
    main()
