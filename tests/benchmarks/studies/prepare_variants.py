"""How alike the variants of one head come out of ``cohort prepare``, and how true grey matter is over simulated heads.

    python -m tests.benchmarks.studies.prepare_variants OUT [--pipelines quasiraw,vbm] [--variants all] [--people 40]

Variants: the real head ``ch2`` of Debian's mricron-data is turned, shifted, cut, stored otherwise, biased and noised (see
``tests/data_pipeline/prepare/heads.py``), and every variant is prepared. The table compares it with the untouched head:
correlation inside both brain masks, difference of TIV and of the brain's volume, cosine of an encoder's features. Without
``--encoder`` that is an untrained ResNet18.

People: simulated T1-like brains get their head's size, skull, scalp and neck, a place of their own, and are prepared by
``vbm``. The table compares grey matter with that of the simulator's own maps of the same people: its correlation, and the
error of a ridge regression of age on both kinds of maps.

The exit status is 1 if a variant is refused or a metric is outside its limits (``LEAST_CORRELATION`` and the constants after
it); a line names each.

Everything is prepared at 1.5 mm, with the default recipe. What is finished in OUT is not repeated. About 27 CPU seconds a scan
by ``quasiraw``, 130 by ``vbm``.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict

from data_pipeline.prepare.driver import prepare_cohort
from data_pipeline.prepare.prepared import BRAIN, GREY_MATTER, PREPROCESSED
from data_pipeline.prepare.settings import PrepareRecipe
from data_pipeline.simulation.cohort import simulate_cohort
from data_pipeline.simulation.people import MEAN_TIV
from data_pipeline.volume.intensity import zscore
from pretrain.encoders import build_encoder
from pretrain.weights.encoder import Encoder
from tests.data_pipeline.prepare.dressed import brain_ml, with_skull_and_neck
from tests.data_pipeline.prepare.heads import CH2, VARIANTS, write_raw
from tests.data_pipeline.prepare.phantoms import turned

SPACING = 1.5
MAIN = {"quasiraw": PREPROCESSED, "vbm": GREY_MATTER}
SEED = 31
BLOCK = 4  # voxels of an edge over which maps are averaged before the regression of age
PENALTIES = 10.0 ** np.arange(-4, 9)
FOLDS = 10
# Limits of the variants against the untouched head, and of prepared maps against the simulator's.
LEAST_CORRELATION = 0.98
MOST_TIV_CHANGE = 3.0  # %
LEAST_COSINE = 0.99
LEAST_GREY_CORRELATION = 0.9
MOST_AGE_RATIO = 1.15
VARIANT_LIMITS = {
    "correlation": (LEAST_CORRELATION, np.inf), "tiv %": (-MOST_TIV_CHANGE, MOST_TIV_CHANGE), "cosine": (LEAST_COSINE, np.inf)
}  # fmt: skip
PEOPLE_LIMITS = {"r of grey matter": (LEAST_GREY_CORRELATION, np.inf), "ratio": (0.0, MOST_AGE_RATIO)}
Map = NDArray[np.float32]


def volume(folder: Path, name: str, kind: str) -> Map:
    """A volume (D, H, W) of a participant's first session."""
    path = folder / f"sub-{name}/ses-1/anat/sub-{name}_ses-1_{kind}.nii.gz"
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def features_of(encoder: torch.nn.Module, voxels: Map) -> NDArray[np.float64]:
    """The features (F,) of a prepared volume."""
    with torch.no_grad():
        return encoder(torch.from_numpy(zscore(voxels.astype(np.float16)))[None, None])[0].double().numpy()


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The cosine of the angle between two feature vectors (F,)."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def load_encoder(folder: Path | None) -> torch.nn.Module:
    """A trained encoder, or an untrained one."""
    if folder is not None:
        return Encoder.from_pretrained(folder)
    torch.manual_seed(0)
    return build_encoder("resnet18", {"width": 0.5, "norm": "group"}).eval()


def variants_table(out: Path, pipeline: str, names: list[str], encoder: torch.nn.Module, workers: int) -> pd.DataFrame:
    """Prepare the head and its variants by a pipeline; a row for each variant."""
    raw, folder = out / f"raw-{pipeline}", out / f"variants-{pipeline}"
    missing = {name: VARIANTS[name]() for name in names if not (raw / f"sub-{name}").is_dir()}
    write_raw(raw, {**({} if (raw / "sub-ch2").is_dir() else {"ch2": CH2}), **missing})
    listed = ["ch2", *(name for name in VARIANTS if (raw / f"sub-{name}").is_dir())]
    rows = "".join(f"sub-{name}\t30\tF\n" for name in listed)
    (raw / "participants.tsv").write_text(f"participant_id\tage\tsex\n{rows}")
    prepare_cohort(raw, folder, PrepareRecipe(pipeline=pipeline, spacing=SPACING), workers=workers)
    figures = pd.read_csv(folder / "participants.tsv", sep="\t").set_index("participant_id")
    own, mask = volume(folder, "ch2", MAIN[pipeline]), volume(folder, "ch2", BRAIN) > 0
    own_features = features_of(encoder, own)
    table = []
    for name in names:
        if f"sub-{name}" not in figures.index:
            table.append({"variant": name, "refused": "yes"})
            continue
        other, inside = volume(folder, name, MAIN[pipeline]), mask & (volume(folder, name, BRAIN) > 0)
        change = {
            figure: 100 * (figures.loc[f"sub-{name}", figure] / figures.loc["sub-ch2", figure] - 1)
            for figure in ("tiv", "brain_ml", "grey_ml") if figure in figures
        }  # fmt: skip
        table.append({
            "variant": name, "correlation": np.corrcoef(own[inside], other[inside])[0, 1],
            **{f"{figure} %": value for figure, value in change.items()},
            "cosine": cosine(features_of(encoder, other), own_features),
        })  # fmt: skip
    return pd.DataFrame(table)


def write_people(out: Path, people: int) -> tuple[Path, Path]:
    """Simulate people with both kinds of scans, and dress their brains as raw heads; return both folders."""
    truth, raw = out / "simulated", out / "raw-people"
    simulate_cohort(truth, participants=people, spacing=SPACING, modality="both", seed=SEED)
    table = pd.read_csv(truth / "truth.tsv", sep="\t")
    generator = np.random.default_rng(SEED)
    places = [(generator.uniform(-10, 10, 3), generator.uniform(-30, 30, 3)) for _ in range(people)]
    names = []
    for number, (name, row) in enumerate(table[table["session_id"] == "ses-1"].set_index("participant_id").iterrows()):
        target = raw / f"{name}/ses-1/anat/{name}_ses-1_T1w.nii.gz"
        names.append(f"{name}\t{row['age']}")
        if target.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        brain = nibabel.load(truth / f"{name}/ses-1/anat/{name}_ses-1_T1w.nii.gz")
        head = with_skull_and_neck(brain, number)
        # Simulated brains have the size of the template, which is larger than people.
        place = turned(*places[number], float(np.cbrt(row["true_tiv"] / brain_ml(brain))))
        nibabel.save(nibabel.Nifti1Image(np.asarray(head.dataobj), place @ head.affine), target)
    (raw / "participants.tsv").write_text("participant_id\tage\n" + "\n".join(names) + "\n")
    return truth, raw


def age_error(maps: list[Map], ages: NDArray[np.float64]) -> float:
    """Mean absolute error in years, out of fold, of a ridge regression on maps averaged over blocks.

    Blocks are not scaled to unit variance: at the brain's rim, where there is next to no grey matter, that is noise.
    """
    blocks = np.stack([_blocks(values) for values in maps]) * MEAN_TIV
    model = RidgeCV(PENALTIES)
    folds = KFold(min(FOLDS, len(ages)), shuffle=True, random_state=0)
    return float(np.abs(cross_val_predict(model, blocks, ages, cv=folds) - ages).mean())


def _blocks(values: Map) -> NDArray[np.float64]:
    """(V,) means of a map over blocks."""
    cut = values[tuple(slice(0, length - length % BLOCK) for length in values.shape)]
    d, h, w = (length // BLOCK for length in cut.shape)
    return cut.reshape(d, BLOCK, h, BLOCK, w, BLOCK).mean(axis=(1, 3, 5), dtype=np.float64).ravel()


def people_table(out: Path, people: int, workers: int) -> pd.DataFrame:
    """Prepare simulated heads by ``vbm``; one row of what is compared with the simulator's own grey matter."""
    truth, raw = write_people(out, people)
    folder = out / "people-vbm"
    done = prepare_cohort(raw, folder, PrepareRecipe(pipeline="vbm", spacing=SPACING), workers=workers)
    figures = pd.read_csv(folder / "participants.tsv", sep="\t").set_index("participant_id")
    true_tiv = pd.read_csv(truth / "truth.tsv", sep="\t").query("session_id == 'ses-1'").set_index("participant_id")
    true_tiv = true_tiv.loc[figures.index, "true_tiv"]
    own, prepared, millilitres = [], [], []
    for name, row in figures.iterrows():
        file = f"{name}/ses-1/anat/{name}_ses-1_space-MNI152_desc-mwp1_probseg.nii.gz"
        values = np.asarray(nibabel.load(truth / file).dataobj, dtype=np.float32)
        millilitres.append(float(values.sum(dtype=np.float64)) * SPACING**3 / 1000)
        own.append(values / np.float32(true_tiv[name]))
        prepared.append(volume(folder, str(name).removeprefix("sub-"), GREY_MATTER) / np.float32(row["tiv"]))
    ages = figures["age"].to_numpy(dtype=np.float64)
    errors = [age_error(maps, ages) for maps in (own, prepared)]
    return pd.DataFrame([{
        "people": len(figures), "refused": people - done.prepared,
        "r of grey matter": np.corrcoef(figures["grey_ml"], millilitres)[0, 1],
        "r of TIV": np.corrcoef(figures["tiv"], true_tiv)[0, 1],
        "age error, own maps": errors[0], "age error, prepared maps": errors[1],
        "ratio": errors[1] / errors[0], "age error, mean age": float(np.abs(ages - ages.mean()).mean()),
    }])  # fmt: skip


def misses(name: str, table: pd.DataFrame) -> list[str]:
    """Return a line for each metric of a table that is missing or outside its limits, and for each refused variant."""
    lines = []
    for row in table.to_dict("records"):
        subject = f"{name}, {row['variant']}" if "variant" in row else name
        if "variant" in row and row.get("refused") == "yes":
            lines.append(f"{subject}: is refused")
            continue
        for metric, (low, high) in (VARIANT_LIMITS if "variant" in row else PEOPLE_LIMITS).items():
            if not low <= row[metric] <= high:
                lines.append(f"{subject}: {metric} is {row[metric]:.4g}, allowed is {low:g} to {high:g}")
    return lines


def hardware() -> str:
    """The machine in a line."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    name = names[0] if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores, {name}, Python {platform.python_version()}"


def main() -> int:
    """Run the benchmark of the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pipelines", default="quasiraw,vbm")
    parser.add_argument("--variants", default="all", help=f"some of {', '.join(VARIANTS)}, all or none")
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = {"all": list(VARIANTS), "none": []}.get(options.variants, options.variants.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    if names:
        encoder = load_encoder(options.encoder)
        for pipeline in options.pipelines.split(","):
            tables[f"variants-{pipeline}"] = variants_table(options.out, pipeline, names, encoder, options.workers)
    if options.people:
        tables["people"] = people_table(options.out, options.people, options.workers)
    print(hardware())
    for name, table in tables.items():
        table.to_csv(options.out / f"{name}.tsv", sep="\t", index=False)
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda value: f'{value:.4f}')}")
    missed = [line for name, table in tables.items() for line in misses(name, table)]
    print("".join(f"\n{line}" for line in missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
