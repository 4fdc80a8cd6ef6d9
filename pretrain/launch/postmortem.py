"""Why a job ended: the watchdog's verdict, or the rank that was killed. It does not depend on which process was quicker."""

from __future__ import annotations

from collections.abc import Sequence

from infra.watchdog.exit_note import RUNNING, ExitNote
from pretrain.launch.processes import Death, signal_name


def explain(notes: Sequence[ExitNote], deaths: Sequence[Death], status: int) -> str:
    """Return one line about the lost rank of a job that failed; empty if no rank was lost.

    Args:
        notes: the exit notes that the ranks left in the run's folder.
        deaths: the ends of this host's ranks, as observed by the launching command.
        status: exit status of the launcher.

    A verdict of the watchdog comes first: it also says in which phase the rank was. Otherwise the lost ranks are those that
    ended without a word: their note still says that they run, or a signal other than SIGTERM ended them. A launcher that
    kills the survivors makes them look the same, so of several the first to die is named.
    """
    if status == 0:
        return ""
    verdicts = [note.verdict for note in notes if note.verdict]
    if verdicts:
        return verdicts[0].removeprefix("watchdog: ")
    hosts = {note.rank: f" ({note.host})" for note in notes}
    endings = {note.rank: note.ending for note in notes}
    silent = [d for d in deaths if endings.get(d.rank, RUNNING if _killed(d) else "") == RUNNING]
    first = [d for d in silent if d.order == min(d.order for d in silent)]
    signals = {d.rank: d.signal_name for d in first}
    ranks = sorted(signals) or [note.rank for note in notes if note.ending == RUNNING]
    # DeepSpeed's launcher exits with the negative signal of the first rank that it finds dead.
    of_launcher = signal_name(256 - status) if len(ranks) == 1 else ""
    told = [
        f"rank {rank}{hosts.get(rank, '')} was killed"
        + (f" by {name}" if (name := signals.get(rank) or of_launcher) else "")
        for rank in ranks
    ]
    hint = "out of memory, perhaps: see dmesg" if told else ""
    return f"{'; '.join(told)} ({hint}); the same command continues from the last checkpoint" if told else ""


def _killed(death: Death) -> bool:
    return death.signal_name not in ("", "SIGTERM")
