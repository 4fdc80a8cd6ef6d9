"""``yaware cohort simulate``: the simulation's settings on the command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from data_pipeline.simulation.cohort import Simulation, claim, simulate_cohort


def add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``yaware cohort simulate``."""
    default = Simulation()
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--participants", type=int, default=default.participants)
    parser.add_argument(
        "--spacing", type=float, default=default.spacing, help="voxel edge in mm (default 6; the paper's: 1.5)"
    )
    parser.add_argument("--modality", default=default.modality, help="vbm (default), t1w or both")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--effect", type=float, default=default.effect, help="scale of every disease (default 1)")
    parser.add_argument("--acceleration", type=float, default=default.acceleration,
                        help="0: disease is a pattern, 2: accelerated ageing, 1 (default): both")  # fmt: skip
    parser.add_argument("--heterogeneity", type=float, default=default.heterogeneity,
                        help="0 (default): a disease is the same in every patient, 1: foci of each one's own")  # fmt: skip
    parser.add_argument("--site-effects", type=float, default=default.site_effects,
                        help="scale of what scanners do to their scans (default 1)")  # fmt: skip
    parser.add_argument("--shares", type=_shares, default=default.shares,
                        help="of patients, the rest healthy (default AD=0.085,MCI=0.05,SCZ=0.1,BD=0.06; none: '')")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (default: every core)")


def _shares(text: str) -> tuple[tuple[str, float], ...]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        return tuple((name.strip(), float(share)) for name, share in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form AD=0.1,SCZ=0.2") from None


def run_simulate(options: argparse.Namespace) -> int:
    """``yaware cohort simulate``."""
    settings = Simulation(
        options.participants, options.spacing, options.modality, options.seed, options.effect, options.acceleration,
        options.heterogeneity, options.site_effects, options.shares,
    )  # fmt: skip
    if (options.out / "participants.tsv").is_file():
        claim(options.out, {**asdict(settings), "shares": dict(settings.shares)})
        print(f"cohort: already simulated: {settings.participants} participants in {options.out}")
        return 0
    simulate_cohort(options.out, settings, options.workers)
    print(f"cohort: simulated {settings.participants} participants in {options.out} (simulated data, no real person)")
    return 0
