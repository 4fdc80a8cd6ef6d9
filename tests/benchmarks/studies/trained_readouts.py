"""Readouts of an encoder that was trained with the ages of the people that they are fitted to.

    python -m tests.benchmarks.studies.trained_readouts

800 people of 200 measurements, of which a direction depends on the age; a small network is trained with y-Aware InfoNCE on
them for 0, 10 and 48 epochs. A readout is fitted to the 800 in two ways: with errors out of fold, and with the errors of 100
calibration people whom the network has not seen (means over 20 draws of them). Printed for each seed and way: the error that
the readout states, its error on 2,000 new people, and what share of these the 95 % interval holds. No scan is involved: the
network can learn 800 people by heart.
"""

from __future__ import annotations

import numpy as np
import torch

from pretrain.kernels import gaussian
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.readouts.fit import OwnFeatures, Ranks, fit_group
from pretrain.readouts.targets import Target, TargetGroup, deal_folds
from pretrain.weights.readouts import Readout

PEOPLE, CALIBRATION, NEW, MEASUREMENTS, BATCH = 800, 100, 2000, 200, 64
DRAWS = 20  # of the calibration people
STEPS = (0, 125, 600)  # 0, 10 and 48 epochs
People = tuple[torch.Tensor, np.ndarray]  # measurements (n, MEASUREMENTS) and ages (n,)


def draw(generator: np.random.Generator, count: int, direction: np.ndarray) -> People:
    """Return the measurements (count, MEASUREMENTS) and ages (count,) of new people."""
    ages = generator.uniform(20, 80, count)
    noise = generator.normal(size=(count, MEASUREMENTS))
    return torch.tensor(noise + ((ages - 50) / 17)[:, None] * direction * 0.25, dtype=torch.float32), ages


def fit(features: np.ndarray, ages: np.ndarray, of_calibration: np.ndarray) -> tuple[Readout, float]:
    """Return a readout of the ages, as ``pretrain.readouts.fit`` makes it, and the mean absolute error that it states.

    Args:
        features: (n, F) of people to fit to and to calibrate on.
        ages: (n,) their ages.
        of_calibration: (n,) who is calibrated on; if nobody is, errors are out of fold.
    """
    everybody, calibrated = np.ones(len(ages), bool), bool(of_calibration.any())
    folds = deal_folds(np.arange(len(ages)), of_calibration if calibrated else everybody, seed=0)
    group = TargetGroup([Target("age", ages)], everybody, folds, of_calibration if calibrated else None)
    fits = fit_group(OwnFeatures(features, everybody, Ranks()), group)
    assert not isinstance(fits, str)
    measured = folds >= 0
    weights, offsets = fits.fold_coefficients[folds[measured], :, 0], fits.fold_intercepts[folds[measured], 0]
    errors = np.abs((features[measured].astype(np.float64) * weights).sum(1) + offsets - ages[measured])
    readout = Readout(
        "age", (), float(fits.intercepts[0]), fits.coefficients[:, 0], fits.fold_coefficients[:, :, 0],
        fits.fold_intercepts[:, 0], residuals=errors, residual_folds=folds[measured], residual_weights=np.ones(len(errors)),
        summary={},
    )  # fmt: skip
    return readout, float(errors.mean())


def report(network: torch.nn.Module, fitted: People, calibrations: list[People], new: People, title: str) -> None:
    """Print a row for each way to measure the errors of a readout: means over the draws of calibration people."""
    with torch.no_grad():
        own, features = (network(people).numpy() for people, _ in (fitted, new))
        others = [(network(people).numpy(), ages) for people, ages in calibrations]
    unseen = np.arange(PEOPLE + CALIBRATION) >= PEOPLE
    for name, fits in {
        "out of fold": [fit(own, fitted[1], np.zeros(PEOPLE, bool))],
        "people not seen": [
            fit(np.concatenate([own, x]), np.concatenate([fitted[1], ages]), unseen) for x, ages in others
        ],
    }.items():
        found = []
        for readout, error in fits:
            low, high = readout.interval(features)
            held = 100 * float(((low <= new[1]) & (new[1] <= high)).mean())
            found.append((error, np.abs(readout.predict(features) - new[1]).mean(), held, (high - low).mean()))
        error, new_error, held, width = np.mean(found, axis=0)
        lowest, highest = min(row[2] for row in found), max(row[2] for row in found)
        several = f" ({lowest:.1f} to {highest:.1f})" if len(found) > 1 else ""
        print(f"| {title} | {name} | {error:.1f} | {new_error:.1f} | {held:.1f}{several} | {width:.0f} |", flush=True)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(
        "| seed | epochs | errors of | stated MAE | MAE of new people | the interval holds, % of new people | its width |"
    )
    print("|---|---|---|---|---|---|---|")
    for seed in range(3):
        generator = np.random.default_rng(seed)
        torch.manual_seed(seed)
        direction = generator.normal(size=MEASUREMENTS) / np.sqrt(MEASUREMENTS) * 3
        fitted, new = draw(generator, PEOPLE, direction), draw(generator, NEW, direction)
        calibrations = [draw(np.random.default_rng([seed, number]), CALIBRATION, direction) for number in range(DRAWS)]
        people, ages = fitted
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
            report(network, fitted, calibrations, new, f"{seed} | {round(steps * BATCH / PEOPLE)}")


if __name__ == "__main__":
    main()
