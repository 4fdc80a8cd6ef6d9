"""``python -m tests.faults.kill_campaign --kills 100``: kill commands at random moments; the same command must end the same.

Five commands are killed in turn with SIGKILL: in half of the cases the command itself, in the other half one of its child
processes, if it has any at that moment. The moment is drawn between the start-up of the interpreter and the duration of a run
that is not killed; a command that has ended by then is started again with another moment. After the kill the same command
is started again at once, and killed again in a third of the cases. Its end is compared with that of a run that was not
killed: the results (see ``tests.faults.kill_commands``) and the names of all files in its folder, so that no temporary file
stays. No process of the killed command may be left 30 s after the kill.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.kill_commands import Command, commands_in, file_names
from tests.runs import ROOT

LEFT_SECONDS = 30.0  # that processes of a killed command have to end
END_SECONDS = 300.0  # that a command has to end when a child was killed, or when it is started again
STARTS = 3  # of a command after a kill, until its status is 0
MARK = "YAWARE_KILL_CAMPAIGN"


@dataclass
class Record:
    """What became of the kills of one command."""

    kills: int = 0
    of_children: int = 0
    failed_starts: int = 0
    longest: float = 0.0
    cases: int = 0
    same: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass
class Started:
    """A running command and what is needed to find all of its processes."""

    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    begun: float
    family: set[psutil.Process] = field(default_factory=set)

    def note_family(self) -> list[psutil.Process]:
        """Note the processes below the command that run now, and return them."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        self.family |= set(children)
        return children

    def left(self) -> list[psutil.Process]:
        """Return the processes of the command that still run, also those that have another parent now."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    self.family.add(process)
        return [process for process in self.family if runs(process)]

    def tail(self) -> str:
        """Return the end of what the command printed."""
        return self.log.read_text(errors="replace")[-1500:]


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(command: Command, out: Path, log: Path) -> Started:
    mark = uuid.uuid4().hex
    environment = {**command.environment(out), MARK: mark, "TMPDIR": str(log.parent)}
    begun = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command.line(out), cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    return Started(process, mark, log, begun)


def end_of(started: Started, seconds: float = END_SECONDS) -> int | None:
    """Wait for the end of a command and return its status; None if it did not end in time, and is killed."""
    limit = time.monotonic() + seconds
    while started.process.poll() is None:
        if time.monotonic() > limit:
            started.note_family()
            started.process.kill()
            started.process.wait()
            return None
        started.note_family()
        time.sleep(0.1)
    return started.process.returncode


def kill_after(started: Started, seconds: float, draw: random.Random) -> str:
    """Kill the command or a child ``seconds`` after the start; return which, empty if the command had ended by then."""
    while (left := started.begun + seconds - time.monotonic()) > 0 and started.process.poll() is None:
        time.sleep(min(left, 0.2))
        started.note_family()
    children = started.note_family()
    if started.process.poll() is not None:
        return ""
    if children and draw.random() < 0.5:
        victim = draw.choice(children)
        with suppress(psutil.NoSuchProcess):
            name = " ".join(victim.cmdline())[:60] or victim.name()
            victim.kill()
            return f"child {name}"
    started.process.kill()
    started.process.wait()
    return "command"


def processes_left(started: Started, since: float) -> list[str]:
    """Return the command lines of the processes that are left ``LEFT_SECONDS`` after ``since``, and end them."""
    while started.left() and time.monotonic() < since + LEFT_SECONDS:
        time.sleep(0.2)
    names = []
    for process in started.left():
        with suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline())[:100] or process.name())
            process.kill()
    return names


class Campaign:
    """Kills commands and compares their ends with those of runs that were not killed.

    Args:
        folder: for logs, temporary files and copies of ends that differ.
        seed: of the moments and the victims.
        commands: by name, in an order in which each may read what those before it wrote undisturbed.
    """

    def __init__(self, folder: Path, seed: int, commands: dict[str, Command]) -> None:
        self.folder, self.draw, self.commands = folder, random.Random(seed), commands
        self.records = {name: Record() for name in self.commands}
        self.durations: dict[str, float] = {}
        self.logs = folder / "tmp"
        self.logs.mkdir(parents=True)
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", ""], check=True)
        self.startup = time.monotonic() - begun

    def run_undisturbed(self) -> None:
        """Run every command once. The results of one are the inputs of the next."""
        for name, command in self.commands.items():
            command.prepare(command.undisturbed)
            started = start(command, command.undisturbed, self.logs / f"{name.replace(' ', '-')}.log")
            if end_of(started) != 0:
                raise RuntimeError(f"{name} fails without a kill:\n{started.tail()}")
            self.durations[name] = time.monotonic() - started.begun
            say(f"{name}: {self.durations[name]:.1f} s without a kill")

    def case(self, name: str, most: int) -> None:
        """Kill a command, start it again and compare. At most ``most`` kills are made."""
        command, record = self.commands[name], self.records[name]
        killed, differences = self._kill_while_running(command, afresh=True)
        if most > 1 and self.draw.random() < 1 / 3:
            again, more = self._kill_while_running(command, afresh=False)
            killed, differences = killed + again, differences + more
        differences += self._end_the_same(command)
        for started, since in killed:
            differences += [f"left behind: {text}" for text in processes_left(started, since)]
        record.cases += 1
        record.same += not differences
        record.differences += differences
        if differences:
            kept = self.folder / f"different-{name.replace(' ', '-')}-{record.cases}"
            shutil.copytree(command.killed, kept)
            say(f"{name}: DIFFERENT, kept in {kept}: {differences}")

    def _kill_while_running(self, command: Command, *, afresh: bool) -> tuple[list[tuple[Started, float]], list[str]]:
        """Start a command and kill it at a random moment, up to five times until it was hit; ``afresh``: in an empty folder.

        Returns the killed command and the moment from which its processes must end (none if a continued command ended
        before), and what was wrong.
        """
        record, name = self.records[command.name], command.name
        longest = self.durations[name]
        for number in range(5 if afresh else 1):
            if afresh:
                shutil.rmtree(command.killed, ignore_errors=True)
                command.prepare(command.killed)
            moment = self.draw.uniform(self.startup, max(longest, 2 * self.startup))
            started = start(command, command.killed, self.logs / f"killed-{number}.log")
            victim = kill_after(started, moment, self.draw)
            since = time.monotonic()
            if not victim:
                longest = since - started.begun
                say(f"{name}: ended before {moment:.1f} s")
                continue
            record.kills += 1
            record.of_children += victim != "command"
            status = end_of(started)
            say(f"{name}: killed after {moment:.1f} s: {victim}; status {status}")
            wrong = [f"did not end after the kill of a {victim}:\n{started.tail()}"] if status is None else []
            return [(started, since if victim == "command" else time.monotonic())], wrong
        return [], []

    def _end_the_same(self, command: Command) -> list[str]:
        """Start a command until its status is 0, and return what differs from the end of an undisturbed run."""
        record = self.records[command.name]
        for _ in range(STARTS):
            started = start(command, command.killed, self.logs / "again.log")
            status = end_of(started)
            record.longest = max(record.longest, time.monotonic() - started.begun)
            if status == 0:
                break
            record.failed_starts += 1
            say(f"{command.name}: the start after the kill ended with status {status}:\n{started.tail()}")
        else:
            return [f"status {status} after {STARTS} starts"]
        expected, found = command.result(command.undisturbed), command.result(command.killed)
        differences = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
        names, now = file_names(command.undisturbed), file_names(command.killed)
        more = [f"file {path} stays" for path in sorted(now - names)]
        return differences + more + [f"file {path} is missing" for path in sorted(names - now)]

    def table(self) -> str:
        titles = (
            "command",
            "kills while running",
            "of a child",
            "cases",
            "same end",
            "failed restarts",
            "longest restart",
        )
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for name, record in self.records.items():
            lines.append(
                f"| `{name}` | {record.kills} | {record.of_children} | {record.cases} | {record.same} | "
                f"{record.failed_starts} | {record.longest:.0f} s |"
            )
        return "\n".join(lines)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run_campaign(kills: int, seed: int, folder: Path, commands: dict[str, Command]) -> Campaign:
    """Kill each of the commands in turn until ``kills`` kills were made in all; return the campaign."""
    campaign = Campaign(folder, seed, commands)
    campaign.run_undisturbed()
    names = list(campaign.commands)
    wanted = {name: kills // len(names) + (number < kills % len(names)) for number, name in enumerate(names)}
    tries = 0
    while any(campaign.records[name].kills < wanted[name] for name in names):
        tries += 1
        if tries > 3 * kills:
            raise RuntimeError("the commands end before they can be killed")
        for name in names:
            missing = wanted[name] - campaign.records[name].kills
            if missing > 0:
                campaign.case(name, missing)
    return campaign


def main() -> int:
    """Run the campaign, print its table and return 1 if an end differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill_campaign", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills of all commands together (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and the victims (default: 0)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    campaign = run_campaign(options.kills, options.seed, folder, commands_in(folder))
    print(campaign.table())
    differences = [f"{name}: {text}" for name, record in campaign.records.items() for text in record.differences]
    print("\n".join(differences or ["no end differs"]))
    if not differences:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
