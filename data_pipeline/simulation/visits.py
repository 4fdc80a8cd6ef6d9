"""The visits of simulated participants: sessions years apart, or the scans of travelling heads on several scanners."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from data_pipeline.simulation.people import Person
from data_pipeline.simulation.settings import Simulation
from infra.errors import UserError


class Visit(NamedTuple):
    """One session of a participant.

    Attributes:
        label: of the session, without ``ses-``.
        number: of the session; noise and bias field are drawn for it.
        age: of the participant, in years.
        site: whose scanner is used.
    """

    label: str
    number: int
    age: float
    site: int


def visits_of(person: Person, settings: Simulation) -> list[Visit]:
    """Return a participant's visits: those of a travelling head are all at one age, ``repeats`` on each of ``scanners``."""
    if not person.travels:
        times = enumerate((0.0, *person.later), start=1)
        return [Visit(str(number), number, person.age + years, person.site) for number, years in times]
    # The number of a visit depends on its scanner and repeat alone, so that a scan is the same for any number of both.
    return [
        Visit(f"site{site:02d}r{repeat + 1}", 1 + site + 1000 * repeat, person.age, site)
        for site in range(settings.scanners)
        for repeat in range(settings.repeats)
    ]


def send_travelling(people: list[Person], settings: Simulation) -> list[Person]:
    """Make the first ``settings.travelling`` healthy participants travelling heads.

    Raises UserError if there are fewer healthy participants.
    """
    healthy = [person.number for person in people if person.diagnosis == "control"]
    if len(healthy) < settings.travelling:
        raise UserError(
            f"travelling={settings.travelling}: only {len(healthy)} of {len(people)} participants are healthy; "
            "raise participants, or lower the shares of patients"
        )
    chosen = set(healthy[: settings.travelling])
    return [replace(person, travels=person.number in chosen) for person in people]
