"""PostgreSQL and the MLflow server of a group on loopback, in a temporary folder, started by infra/launch/tracking/serve.sh."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.distributed import free_port
from infra.processes.with_parent import command_with_parent
from tests.runs import ROOT

TRACKING = ROOT / "infra" / "launch" / "tracking"
ADMIN = "admin"
DRIVERS = ("psycopg2", "flask_wtf")


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs, of the newest version; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    command = shutil.which("initdb")
    return None if command is None else Path(command).resolve().parent


def why_not() -> str | None:
    """Return why this machine cannot run the server, or None if it can."""
    if binaries() is None:
        return "PostgreSQL not found (Debian: postgresql; make test-packages)"
    if shutil.which("setpriv") is None:
        return "setpriv not found (Debian: util-linux)"
    missing = [name for name in DRIVERS if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed (pip install -e '.[server]')" if missing else None


@dataclass
class Database:
    """A running PostgreSQL, with the role and the empty database ``mlflow``.

    Attributes:
        folder: its files and those of the servers, which its user may read.
        variables: how to reach it, for PostgreSQL's programs and serve.sh; ``PATH`` has PostgreSQL's programs.
        secrets: the folder of the files of secrets.
    """

    folder: Path
    variables: dict[str, str]
    secrets: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of PostgreSQL's commands, as the user mlflow, and of serve.sh."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MLFLOW_"))}
        return {**inherited, **self.variables}

    def command(self, *command: str) -> str:
        """Run a command against the database and return what it printed; fails with its error."""
        password = (self.secrets / "database_password").read_text()
        done = subprocess.run(
            command, env={**self.environment, "PGPASSWORD": password}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout


@contextmanager
def database() -> Iterator[Database]:
    """Yield a PostgreSQL that runs inside the block, as an unprivileged user if this process is root."""
    folder = Path(tempfile.mkdtemp(prefix="yaware-tracking-"))
    folder.chmod(0o755)
    programs, port = binaries(), free_port()
    assert programs is not None
    made = Database(folder, {
        "PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGDATABASE": "mlflow",
        "TRACKING_SECRETS": str(folder / "secrets"), "TRACKING_ARTIFACTS": str(folder / "artifacts"),
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }, folder / "secrets")  # fmt: skip
    made.secrets.mkdir(mode=0o700)
    for name in ("database_password", "flask_secret_key", "admin_password"):
        (made.secrets / name).write_text(secrets.token_hex(16))
    user, data = _owner(), folder / "data"
    data.mkdir()
    shutil.copy(made.secrets / "database_password", folder / "first_password")
    for path in (data, folder / "first_password"):
        if user:
            shutil.chown(path, user)
    log = (folder / "postgres.log").open("ab")
    # SIGINT to a PostgreSQL whose parent has died: it ends its connections and then itself.
    as_user = [
        "setpriv",
        "--pdeathsig=INT",
        *([f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []),
    ]
    server = None
    try:
        subprocess.run(
            [*as_user, programs / "initdb", f"--pgdata={data}", "--username=mlflow",
             f"--pwfile={folder / 'first_password'}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8",
             "--no-sync"], check=True, cwd=folder, stdout=log, stderr=log,
        )  # fmt: skip
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off",
                    "shared_buffers": "32MB"}  # fmt: skip
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        started = [*as_user, str(programs / "postgres"), "-D", str(data), *flags]
        server = subprocess.Popen(started, cwd=folder, stdout=log, stderr=log)
        _await_database(made, server)
        made.command("createdb", "mlflow")
        yield made
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _owner() -> str | None:
    """The user who runs PostgreSQL, which refuses to run as root: Debian's user of it; None stands for this process's user."""
    if os.geteuid() != 0:
        return None
    return "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"


def _await_database(made: Database, server: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 120
    while subprocess.run(["pg_isready", "--quiet"], env=made.environment, check=False).returncode != 0:
        assert server.poll() is None, (made.folder / "postgres.log").read_text()[-3000:]
        assert time.monotonic() < limit, "PostgreSQL did not start"
        time.sleep(0.1)


@dataclass
class Server:
    """A running MLflow server.

    Attributes:
        uri: its address.
        database: the PostgreSQL that it uses.
        passwords: the password of each user; ``log_in`` takes it from here.
    """

    uri: str
    database: Database
    passwords: dict[str, str]

    def log_in(self, user: str, password: str | None = None) -> dict[str, str]:
        """Return the environment variables with which a user logs in, with another password if it is given."""
        chosen = self.passwords[user] if password is None else password
        return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": chosen}


@contextmanager
def server(used: Database, **variables: str) -> Iterator[Server]:
    """Yield an MLflow server that runs inside the block, with further environment variables of serve.sh."""
    port, log = free_port(), used.folder / "server.log"
    given = {**used.environment, "TRACKING_PORT": str(port), "TRACKING_WORKERS": "1", **variables}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command_with_parent([str(TRACKING / "serve.sh")]), cwd=ROOT, env=given, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    try:
        _await_server(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}", used, {ADMIN: (used.secrets / "admin_password").read_text()})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_server(process: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    limit = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < limit, f"the server did not start: {log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def page_blocks(page: Path, heading: str) -> Sequence[str]:
    """Return the ``bash`` blocks of a section of a Markdown page, in order."""
    text = page.read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    parts = section.split("```bash\n")[1:]
    return [part.split("```")[0] for part in parts]
