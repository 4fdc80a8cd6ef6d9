"""The settings of a simulated cohort and their limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from infra.errors import UserError, nearest

SHARES = {"AD": 0.085, "MCI": 0.05, "SCZ": 0.1, "BD": 0.06}  # of patients, by diagnosis
MODALITIES = ("vbm", "t1w", "both")
TRAVEL = ("travelling", "scanners", "repeats")  # the settings of travelling heads


@dataclass(frozen=True)
class Simulation:
    """The settings of a simulated cohort, as recorded in simulation.json; see ``simulate_cohort``."""

    participants: int = 1200
    spacing: float = 6.0  # mm
    modality: str = "vbm"
    seed: int = 0
    effect: float = 1.0
    acceleration: float = 1.0
    heterogeneity: float = 0.0
    site_effects: float = 1.0
    sites: int = 12
    misregistration: float = 0.0  # mm
    individuality: float = 1.0
    subtypes: int = 1
    travelling: int = 0
    scanners: int = 8
    repeats: int = 2
    shares: tuple[tuple[str, float], ...] = tuple(SHARES.items())  # pairs, so that the settings are hashable

    def to_dict(self) -> dict[str, Any]:
        """The content of simulation.json; without travelling heads, their settings are left out."""
        record = {**asdict(self), "shares": dict(self.shares)}
        return record if self.travelling else {name: record[name] for name in record if name not in TRAVEL}

    def check(self) -> None:
        """Check every setting; raises UserError if one is outside its limits."""
        if self.participants < 1:
            raise UserError(f"participants={self.participants} must be at least 1")
        if not 1.0 <= self.spacing <= 12.0:
            raise UserError(f"spacing={self.spacing} is not in 1..12 mm; the paper's grid has 1.5 mm")
        for name in ("sites", "subtypes"):
            if not 1 <= getattr(self, name) <= 1000:
                raise UserError(f"{name}={getattr(self, name)} is not in 1..1000")
        if self.modality not in MODALITIES:
            raise UserError(
                f"modality={self.modality!r} is not known{nearest(self.modality, MODALITIES)}; "
                f"allowed: {', '.join(MODALITIES)}"
            )
        for name, highest in (
            ("effect", None), ("acceleration", 2), ("heterogeneity", 1), ("site_effects", None), ("misregistration", 10),
            ("individuality", 10),
        ):  # fmt: skip
            value = getattr(self, name)
            if value < 0 or (highest is not None and value > highest):
                limits = "0 or more" if highest is None else f"in 0..{highest}"
                raise UserError(f"{name}={value} must be {limits}")
        self._check_travel()
        self._check_shares()

    def _check_travel(self) -> None:
        if not 0 <= self.travelling <= self.participants:
            raise UserError(
                f"travelling={self.travelling} is not in 0..{self.participants}, the number of participants"
            )
        if not 1 <= self.repeats <= 100:
            raise UserError(f"repeats={self.repeats} is not in 1..100")
        if self.scanners < 1 or (self.travelling and self.scanners > self.sites):
            raise UserError(f"scanners={self.scanners} is not in 1..{self.sites}, the number of sites; raise sites")

    def _check_shares(self) -> None:
        shown = ",".join(f"{name}={share:g}" for name, share in self.shares)
        for name, _ in self.shares:
            if name not in SHARES:
                raise UserError(f"shares={shown}: {name} is not a simulated disease; allowed: {', '.join(SHARES)}")
        if any(share < 0 for _, share in self.shares) or sum(share for _, share in self.shares) > 1:
            raise UserError(f"shares={shown}: every share must be 0 or more, and their sum at most 1")
