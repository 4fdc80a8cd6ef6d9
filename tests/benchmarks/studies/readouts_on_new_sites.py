"""What share of healthy people at new sites the 95 % intervals of readouts hold, for the encoders of docs/experiments_2.md.

    python -m tests.benchmarks.studies.readouts_on_new_sites OUT [--levels middle,easy,hard] [--seeds 3]

OUT is the folder of ``make experiment2`` with its shards and encoders. The readouts were fitted to the ages of people of twelve
sites; the controls of a clinic are at twelve others, whom no encoder has seen. Printed for each y-aware encoder: the age error,
the range of the bias over the sites, and the coverage before and after the bias of each site is subtracted
(``evaluation.statistics.site_bias``). It takes about fifteen seconds an encoder on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from data_pipeline.storage.manifest import Manifest
from evaluation.experiments.second.evaluate import run_of, shards_of
from evaluation.experiments.second.plan import LEVELS, Piece
from evaluation.experiments.tables import markdown
from evaluation.statistics.site_bias import site_bias
from pretrain.weights.encoder import Encoder


def coverage(out: Path, piece: Piece) -> dict[str, str | int]:
    """Return a row of the table for an encoder."""
    manifest = Manifest.load(shards_of(out, piece.level, clinic=True))
    controls = manifest.scans[manifest.scans["diagnosis"] == "control"]
    table = Encoder.from_pretrained(run_of(out, piece)).embed(controls, manifest=manifest, readouts=True)
    ages = controls["age"].to_numpy(float)
    predicted, low, high = (table[f"predicted_age{end}"].to_numpy() for end in ("", "_low", "_high"))
    sites = site_bias(
        ages, predicted, low, high, sites=controls["site"].to_numpy(), participants=controls["participant_id"].to_numpy()
    ).set_index("site")  # fmt: skip
    each, whole = sites.drop(index="all"), sites.loc["all"]
    return {
        "encoder": piece.name, "people": int(whole["people"]), "sites": len(each),
        "age MAE": f"{abs(predicted - ages).mean():.2f}",
        "bias of the sites, years": f"{each['bias'].min():.1f} to {each['bias'].max():.1f}",
        "coverage, %": f"{100 * whole['coverage']:.1f}",
        "after the bias is subtracted, %": f"{100 * whole['corrected_coverage']:.1f}",
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    pieces = [
        Piece(level, "encoder", "y-aware", seed) for level in options.levels.split(",") for seed in range(options.seeds)
    ]
    print("\n".join(markdown(pd.DataFrame([coverage(options.out.resolve(), piece) for piece in pieces]))))


if __name__ == "__main__":
    main()
