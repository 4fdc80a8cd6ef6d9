"""infra/launch/tracking: the files from which a group starts its MLflow server, without starting it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.runs import ROOT
from tests.tracking_server import TRACKING

SECRETS = {"database_password", "flask_secret_key", "admin_password"}
SERVE = TRACKING / "serve.sh"


def names(lines):
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


@pytest.fixture
def started(tmp_path):
    """Return a function that runs serve.sh with a program ``mlflow`` which prints its arguments and environment."""
    fake = tmp_path / "bin/mlflow"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv\n')
    fake.chmod(0o755)

    def run(**variables):
        given = {"PATH": f"{fake.parent}:/usr/bin:/bin", **variables}
        return subprocess.run([SERVE], env=given, capture_output=True, text=True, timeout=30)

    return run


@pytest.fixture
def secrets(tmp_path):
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name in SECRETS:
        (folder / name).write_text(f"{name}-value\n")
    return folder


def test_the_script_listens_on_loopback_with_login_and_artifacts_and_no_secret_among_its_arguments(started, secrets):
    done = started(TRACKING_SECRETS=str(secrets), PGHOST="127.0.0.1")
    assert done.returncode == 0, done.stderr
    arguments, _, variables = done.stdout.partition("4\n")
    for words in ("--app-name\nbasic-auth\n", "--host\n127.0.0.1\n", "--serve-artifacts\n", "--workers\n"):
        assert words in arguments
    assert not [name for name in SECRETS if f"{name}-value" in arguments]
    lines = [
        "PGPASSWORD=database_password-value\n", "MLFLOW_FLASK_SERVER_SECRET_KEY=flask_secret_key-value\n",
        "MLFLOW_AUTH_ADMIN_PASSWORD=admin_password-value\n", f"MLFLOW_AUTH_CONFIG_PATH={TRACKING}/basic_auth.ini\n",
    ]  # fmt: skip
    for line in lines:
        assert line in variables


def test_secrets_may_come_from_the_environment_or_from_systemd(started, secrets):
    assert "PGPASSWORD=database_password-value\n" in started(CREDENTIALS_DIRECTORY=str(secrets)).stdout
    assert "PGPASSWORD=mine\n" in started(TRACKING_SECRETS=str(secrets), PGPASSWORD="mine").stdout


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_missing_or_empty_secret_is_one_line(started, secrets, name):
    (secrets / name).write_text("")
    done = started(TRACKING_SECRETS=str(secrets))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"serve.sh: error: no secret in {secrets}/{name} (missing, empty or not readable)")
    assert done.stderr.count("\n") == 1


def test_compose_pins_its_images_checks_its_health_and_publishes_on_loopback_only():
    composed = yaml.safe_load((TRACKING / "compose.yaml").read_text())
    services = composed["services"]
    for service in services.values():
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+(\.\d+)?[\w.-]*", service["image"]), "no pinned version"
        assert service["healthcheck"]["test"]
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", []))
        assert set(service["secrets"]) <= set(composed["secrets"]) == SECRETS
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(composed["volumes"])
    assert "ports" not in services["database"]
    assert services["server"]["depends_on"]["database"]["condition"] == "service_healthy"
    context = (TRACKING / services["server"]["build"]["context"]).resolve()
    assert context == ROOT
    container = (context / services["server"]["build"]["dockerfile"]).read_text()
    copied = re.findall(r"^COPY (.*) \./$", container, re.MULTILINE)[0].split()
    assert all((ROOT / path).is_file() for path in copied)
    assert 'ENTRYPOINT ["./serve.sh"]' in container
    version = re.search(r"^mlflow==(.*)$", (ROOT / "infra/constraints.txt").read_text(), re.MULTILINE)
    assert services["server"]["image"].endswith(f":{version[1]}")


def test_the_server_needs_the_same_packages_everywhere():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is of Python 3.11")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = names((TRACKING / "requirements.txt").read_text().splitlines())
    assert wanted == names(extras["server"]) | {"mlflow"}
    pinned = names(line.partition(" ;")[0] for line in (ROOT / "infra/constraints.txt").read_text().splitlines())
    assert wanted <= pinned


def test_no_file_holds_a_secret():
    secret = r"(?im)^[ \t]*(admin_password|PGPASSWORD|POSTGRES_PASSWORD|database_password)[ \t]*[=:][ \t]*\w"
    for path in TRACKING.iterdir():
        text = path.read_text()
        assert not re.search(secret, text), path
        assert not re.search(r"://\w+:\w+@", text), path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze not found (Debian: systemd)")
def test_systemd_accepts_the_unit(tmp_path):
    text = (TRACKING / "mlflow.service").read_text()
    assert re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE) == ["/opt/mlflow/serve.sh"]
    assert "TRACKING_HOST=127.0.0.1" in text
    assert set(re.findall(r"^LoadCredential=(\w+):/etc/mlflow/secrets/\1$", text, re.MULTILINE)) == SECRETS
    unit = Path(tmp_path) / "mlflow.service"
    unit.write_text(text.replace("/opt/mlflow/serve.sh", str(SERVE)))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
