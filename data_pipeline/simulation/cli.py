"""``yaware cohort simulate``: the arguments of ``simulate_cohort`` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.simulation.cohort import is_complete, simulate_cohort
from data_pipeline.simulation.settings import SHARES, Simulation


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``yaware cohort simulate`` to a parser."""
    default = Simulation()
    shares = ",".join(f"{name}={share:g}" for name, share in SHARES.items())
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--participants", type=int, default=default.participants, help="number of participants (default 1200)"
    )
    parser.add_argument(
        "--spacing",
        type=float,
        default=default.spacing,
        help="edge of a voxel in mm (default 6; the paper's grid has 1.5)",
    )
    parser.add_argument("--modality", default=default.modality, help="vbm (default), t1w or both")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="another seed gives other participants and sites (default 0)"
    )
    parser.add_argument(
        "--effect", type=float, default=default.effect, help="scale of every disease's effect (default 1)"
    )
    parser.add_argument(
        "--acceleration",
        type=float,
        default=default.acceleration,
        help="0: disease is a pattern of regions, 2: accelerated ageing, 1 (default): half of each",
    )
    parser.add_argument(
        "--heterogeneity",
        type=float,
        default=default.heterogeneity,
        help="0 (default): a disease is the same in every patient, 1: each patient has their own foci",
    )
    parser.add_argument(
        "--site-effects",
        type=float,
        default=default.site_effects,
        help="scale of the sites' gain, bias field and noise (default 1)",
    )
    parser.add_argument("--sites", type=int, default=default.sites, help="number of sites (default 12)")
    parser.add_argument(
        "--misregistration", type=float, default=default.misregistration, metavar="MM",
        help="mm by which registration misses, another error for every scan (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--individuality", type=float, default=default.individuality,
        help="scale of the pattern of folds that is a participant's own (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--subtypes",
        type=int,
        default=default.subtypes,
        help="subtypes of each disease, with different foci (default 1)",
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
    simulate_cohort(
        options.out, participants=options.participants, spacing=options.spacing, modality=options.modality,
        seed=options.seed, effect=options.effect, acceleration=options.acceleration,
        heterogeneity=options.heterogeneity, site_effects=options.site_effects, sites=options.sites,
        misregistration=options.misregistration, individuality=options.individuality, subtypes=options.subtypes,
        shares=options.shares,
        workers=options.workers,
    )  # fmt: skip
    if was_complete:
        print(f"cohort: already simulated: {options.participants} participants in {options.out}")
    else:
        print(
            f"cohort: simulated {options.participants} participants in {options.out} (simulated data, no real person)"
        )
    return 0
