"""Readouts of an encoder that was trained with the ages of the people that they are fitted to.

    python -m tests.benchmarks.trained_readouts

800 people of 200 measurements, of which a direction depends on the age; a small network is trained with y-Aware InfoNCE on
them for 0, 10 and 48 epochs. Printed for each seed: the out-of-fold error of the readout on the 800, its error on 2,000 new
people, and how many of these the 95 % interval holds. No scan is involved: the network can learn 800 people by heart.
"""

from __future__ import annotations

import numpy as np
import torch

from pretrain.kernels import gaussian
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.readouts.solve import FOLDS, Moments, nested_ridge
from pretrain.weights.readouts import Readout

PEOPLE, NEW, MEASUREMENTS, BATCH = 800, 2000, 200, 64
STEPS = (0, 125, 600)  # 0, 10 and 48 epochs


def draw(generator: np.random.Generator, count: int, direction: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Return the measurements (count, MEASUREMENTS) and ages (count,) of new people."""
    ages = generator.uniform(20, 80, count)
    noise = generator.normal(size=(count, MEASUREMENTS))
    return torch.tensor(noise + ((ages - 50) / 17)[:, None] * direction * 0.25, dtype=torch.float32), ages


def fit(features: np.ndarray, ages: np.ndarray) -> tuple[Readout, float]:
    """Return the readout of the ages, as `pretrain.readouts.fit` makes it, and its out-of-fold mean absolute error."""
    folds = np.random.default_rng(0).permutation(np.arange(len(features)) % FOLDS)
    sums = Moments.empty(features[:50].mean(0).astype(np.float64), np.array([ages.mean()]))
    sums.add(features, ages[:, None], folds)
    fits = nested_ridge(sums)
    errors = np.empty(len(ages))
    for fold in range(FOLDS):
        own = folds == fold
        predicted = features[own].astype(np.float64) @ fits.fold_coefficients[fold] + fits.fold_intercepts[fold]
        errors[own] = np.abs(predicted[:, 0] - ages[own])
    order = np.lexsort((errors, folds))
    readout = Readout(
        "age", (), float(fits.intercepts[0]), fits.coefficients[:, 0], fits.fold_coefficients[:, :, 0],
        fits.fold_intercepts[:, 0], residuals=errors[order], residual_folds=folds[order],
        residual_weights=np.ones(len(ages)), summary={},
    )  # fmt: skip
    return readout, float(errors.mean())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(
        "| seed | epochs | out-of-fold MAE | MAE of new people | 95 % interval holds of new people |\n|---|---|---|---|---|"
    )
    for seed in range(3):
        generator = np.random.default_rng(seed)
        torch.manual_seed(seed)
        direction = generator.normal(size=MEASUREMENTS) / np.sqrt(MEASUREMENTS) * 3
        (people, ages), (new, new_ages) = draw(generator, PEOPLE, direction), draw(generator, NEW, direction)
        network = torch.nn.Sequential(torch.nn.Linear(MEASUREMENTS, 64), torch.nn.ReLU())
        head = torch.nn.Linear(64, 16)
        optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], 1e-3)
        done = 0
        for steps in STEPS:
            for _ in range(done, steps):
                rows = torch.tensor(generator.choice(PEOPLE, BATCH, replace=False))
                views = torch.stack([people[rows] + 0.5 * torch.randn(BATCH, MEASUREMENTS) for _ in range(2)])
                embedded = head(network(views.flatten(0, 1))).view(2, BATCH, -1)
                loss = y_aware_infonce(embedded, torch.tensor(ages)[rows, None].float(), kernel=gaussian(5.0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            done = steps
            with torch.no_grad():
                readout, error = fit(network(people).numpy(), ages)
                features = network(new).numpy()
            low, high = readout.interval(features)
            held = float(((low <= new_ages) & (new_ages <= high)).mean())
            new_error = float(np.abs(readout.predict(features) - new_ages).mean())
            epochs = round(steps * BATCH / PEOPLE)
            print(f"| {seed} | {epochs} | {error:.1f} | {new_error:.1f} | {held:.1%} |", flush=True)


if __name__ == "__main__":
    main()
