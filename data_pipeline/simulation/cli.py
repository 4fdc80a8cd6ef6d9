"""``yaware cohort simulate``: the arguments of ``simulate_cohort`` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.simulation.cohort import is_complete, simulate_cohort
from data_pipeline.simulation.settings import SHARES, Simulation

# Help of the options whose default is that of the field of ``Simulation`` of the same name.
HELP = {
    "participants": "number of participants",
    "spacing": "edge of a voxel in mm; the paper's grid has 1.5",
    "modality": "vbm, t1w or both",
    "seed": "another seed gives other participants and sites",
    "effect": "scale of every disease's effect",
    "acceleration": "0: disease is a pattern of regions, 2: accelerated ageing, 1: half of each",
    "heterogeneity": "0: a disease is the same in every patient, 1: each patient has their own foci",
    "site_effects": "scale of the sites' gain, bias field and noise",
    "sites": "number of sites",
    "misregistration": "mm by which registration misses, another error for every scan",
    "individuality": "scale of the pattern of folds that is a participant's own",
    "subtypes": "subtypes of each disease, with different foci",
    "travelling": "healthy participants who are scanned on several scanners at one age (travelling heads)",
    "scanners": "scanners of the travelling heads: the first so many sites",
    "repeats": "scans of a travelling head on each scanner",
}


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware cohort simulate`` to a parser."""
    default = Simulation()
    shares = ",".join(f"{name}={share:g}" for name, share in SHARES.items())
    parser.add_argument("out", type=Path, help="folder to write")
    for name, text in HELP.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} (default %(default)s)"
        )
    parser.add_argument(
        "--shares",
        type=_parse_shares,
        help=f"share of each patient group; the others are healthy (default {shares}; '' for none)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: every core)")


def _parse_shares(text: str) -> dict[str, float]:
    try:
        pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
        return {name.strip(): float(share) for name, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form AD=0.1,SCZ=0.2") from None


def run_simulate(options: argparse.Namespace) -> int:
    """Run ``yaware cohort simulate``; return the exit status."""
    was_complete = is_complete(options.out)
    settings = {name: getattr(options, name) for name in HELP}
    simulate_cohort(options.out, **settings, shares=options.shares, workers=options.workers)
    if was_complete:
        print(f"cohort: already simulated: {options.participants} participants in {options.out}")
    else:
        print(
            f"cohort: simulated {options.participants} participants in {options.out} (simulated data, no real person)"
        )
    return 0
