"""The watchdog ends a job whose ranks cannot go on, and its log names the rank that is to blame."""

from __future__ import annotations

from infra.watchdog.exit_note import ExitNote as ExitNote
from infra.watchdog.exit_note import RankNote as RankNote
from infra.watchdog.watchdog import EXIT_STATUS as EXIT_STATUS
from infra.watchdog.watchdog import Watchdog as Watchdog
from infra.watchdog.watchdog import beat as beat
from infra.watchdog.watchdog import connect as connect
from infra.watchdog.watchdog import note_exit as note_exit
from infra.watchdog.watchdog import phase as phase
from infra.watchdog.watchdog import steady as steady

__all__ = ["EXIT_STATUS", "ExitNote", "RankNote", "Watchdog", "beat", "connect", "note_exit", "phase", "steady"]
