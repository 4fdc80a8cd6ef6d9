"""Small simulated evaluations, logged to a store as ``yaware evaluate`` logs them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from evaluation.statistics.metrics import METRICS, chance_level
from infra.tracking.tracker import Tracker

TITLES = {"scz": "schizophrenia", "ad": "Alzheimer's disease", "age": "age", "site": "site"}
PEOPLE = 130  # every third has a second scan


def people(seed: int = 0) -> pd.DataFrame:
    """A row per scan: key, participant, age, sex, site, diagnosis, and a normal trait that predictions depend on."""
    generator = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "participant": [f"tiny/{n:03d}" for n in range(PEOPLE)],
            "age": generator.uniform(20, 75, PEOPLE).round(1),
            "sex": generator.choice(["F", "M"], PEOPLE),
            "site": generator.choice(["north", "south", "island"], PEOPLE, p=[0.5, 0.4, 0.1]),
            "diagnosis": generator.choice(["control", "SCZ"], PEOPLE),
            "trait": generator.normal(size=PEOPLE),
        }
    )
    table = pd.concat([table, table[::3]], ignore_index=True)
    table.insert(0, "key", [f"tiny_sub-{n:03d}" for n in range(len(table))])
    return table


def predictions(scans: pd.DataFrame, skill: float, seed: int, tasks: tuple[str, ...]) -> pd.DataFrame:
    """Predictions of a probe, with probabilities and folds; the classes are 2 ``skill`` standard deviations apart."""
    generator, parts = np.random.default_rng(seed), []
    count = len(scans)
    codes = pd.Categorical(scans["participant"]).codes
    for task in tasks:
        noise = 0.7 * scans["trait"].to_numpy() + 0.7 * generator.normal(size=count)
        part = scans[["key", "participant", "age", "sex", "site"]].assign(task=task, title=TITLES[task], fold=codes % 5)
        if task == "age":
            label = scans["age"].to_numpy()
            part = part.assign(kind="regression", label=label, answer=0.3 * 47 + 0.7 * label + 9 * noise / (1 + skill))
        elif task == "site":
            label = pd.Categorical(scans["site"]).codes.astype(float)
            answer = np.where(generator.random(count) < 0.4, label, generator.integers(0, 3, count))
            part = part.assign(kind="multiclass", label=label, answer=answer)
        else:
            label = (scans["diagnosis"] == "SCZ").to_numpy(float)
            answer = skill * (2 * label - 1) + noise
            probability = 1 / (1 + np.exp(-2 * skill * answer))
            part = part.assign(kind="binary", label=label, answer=answer, probability=probability)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def resamples(table: pd.DataFrame) -> pd.DataFrame:
    """Three repeats and ten halvings of stored predictions, as a protocol on fixed features logs them."""
    rows = []
    for task, part in table.groupby("task", sort=False):
        codes = pd.Categorical(part["participant"]).codes
        half = [("half", number, side) for number in range(10) for side in (0, 1)]
        for kind, number, side in [("repeat", number, 0) for number in range(3)] + half:
            chosen = np.random.default_rng(number).permutation(codes.max() + 1)[codes] % 2 == side
            used = part if kind == "repeat" else part[chosen]
            labels, answers = used["label"].to_numpy(), used["answer"].to_numpy()
            for name, metric in METRICS[part["kind"].iloc[0]].items():
                value = metric(labels, answers) + (0.01 * (number - 1) if kind == "repeat" else 0)
                rows.append((task, name, kind, number, side, value, chance_level(part["kind"].iloc[0], labels)))
    return pd.DataFrame(rows, columns=["task", "metric", "kind", "number", "side", "value", "chance"])


def log_reliability(
    uri: str, name: str, step: int, icc: float, weights="5" * 64, experiment="kept", **more: str
) -> str:
    """Log a run of ``yaware reliability`` with ``more`` tags (``yaware.NAME``) and return its id."""
    tags = {
        "yaware.kind": "reliability",
        "yaware.run_name": name,
        "yaware.step": str(step),
        "yaware.weights_sha256": weights,
        **{f"yaware.{name}": value for name, value in more.items()},
    }
    tracker = Tracker.open(uri, experiment, f"reliability of {name} step {step}", tags=tags)
    metrics = {
        "scanners.icc21": icc, "scanners.icc21.q25": icc - 0.1, "scanners.icc21.q75": icc + 0.05, "repeats.icc21": 0.99,
        "scanners.icc31": icc + 0.02, "identification": 0.8, "identification.low": 0.7, "identification.high": 0.9,
        "identification.chance": 0.05, "scanners.sd.age": 2.5, "scanners.sd.age.low": 2.0, "scanners.sd.age.high": 3.0,
        "scanner": 0.3, "scanner.low": 0.2, "scanner.high": 0.4, "scanner.chance": 0.125,
    }  # fmt: skip
    tracker.log_metrics([(key, value, step) for key, value in metrics.items()])
    tracker.end()
    return str(tracker.run_id)


def log_evaluation(
    uri: str, folder, name: str, *, step: int, skill: float, scans: pd.DataFrame, tasks=tuple(TITLES), experiment="kept",
    simulated=True, tags=None, params=None, metrics=None, saliency=False, sizes=(20, 40, 80), halves=True,
) -> str:  # fmt: skip
    """Log one evaluation and return its run id. Without ``metrics`` only its tables are logged, no metric."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng([step, len(name)])
    table = predictions(scans, skill, step + len(name), tasks)
    table.to_parquet(folder / "predictions.parquet", index=False)
    if halves:
        resamples(table).to_csv(folder / "resamples.csv", index=False)
    curve = [
        {
            "task": task, "n_train": size, "draw": draw,
            "auc": 0.5 + 0.3 * skill * (size / 100) ** 0.3 + 0.03 * generator.normal(),
        }
        for task in tasks if task in ("scz", "ad") for size in sizes for draw in range(10)
    ]  # fmt: skip
    pd.DataFrame(curve, columns=["task", "n_train", "draw", "auc"]).to_csv(folder / "curve.csv", index=False)
    embedding = scans[["age", "sex", "site", "diagnosis"]].assign(
        x=(scans["age"] - 47) / 10 * skill + generator.normal(size=len(scans)),
        y=scans["trait"] + (scans["site"] == "south"),
    )
    embedding.to_parquet(folder / "embedding.parquet", index=False)
    if saliency:
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (20, 24, 20)), indexing="ij"))
        brain = ((grid**2).sum(0) < 0.8).astype(np.float16)
        centre = np.array([0.3, 0, 0])[:, None, None, None]
        change = np.exp(-((grid - centre) ** 2).sum(0) * 8).astype(np.float16)
        np.savez(folder / "saliency_scz.npz", background=brain, map=change * brain)
    all_tags = {
        "yaware.kind": "evaluation", "yaware.run_name": name, "yaware.method": name, "yaware.step": str(step),
        "yaware.weights_sha256": "5" * 64, "yaware.manifest_digest": "a" * 64, "yaware.simulated": str(simulated),
        "yaware.version": "0.1.0", "yaware.encoder": "resnet18", "yaware.pretraining_run": "", **(tags or {}),
    }  # fmt: skip
    tracker = Tracker.open(uri, experiment, f"evaluate {name} step {step}", tags=all_tags)
    tracker.log_params({"folds": 5, "draws": 10, "seed": 0, **(params or {})})
    tracker.log_metrics([(key, value, step) for key, value in (metrics or {}).items()])
    for path in sorted(folder.iterdir()):
        tracker.log_artifact(path, "evaluation")
    tracker.end()
    return str(tracker.run_id)
