"""The commands of docs/cluster.md, typed one block after the other on the login host of a real SLURM."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT
from tests.slurm import CONTROLLER, cluster, why_not
from tests.slurm_job import ENDED, make_checkout, variables

REASON = why_not()
PAGE = ROOT / "docs" / "cluster.md"


def blocks() -> list[str]:
    """Return the page's blocks of commands, in order."""
    return re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_names_every_work_that_can_be_submitted():
    from infra.slurm.batch_script import WORKS

    submitted = re.findall(
        r"^yaware launch --slurm (?:--[\w-]+ (?!--)\S+ |--dry-run )*(\w+)", "".join(blocks()), re.MULTILINE
    )
    assert set(submitted) == set(WORKS)


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the page needs of the checkout."""
    make_checkout(tmp_path)
    (tmp_path / ".venv/bin/activate").write_text(f'PATH="{tmp_path}/.venv/bin:$PATH"\n')
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    return tmp_path


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2400)
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_page_leads_to_two_reports(checkout):
    with cluster() as slurm:
        given = variables(checkout)
        del given["MLFLOW_TRACKING_URI"]  # the page sets it
        state = checkout / "environment"  # what the user's shell keeps from block to block
        state.touch()
        for block in blocks():
            script = f"set -euo pipefail; source {state}\n{block}\nexport -p > {state}"
            done = subprocess.run(
                slurm.enter(CONTROLLER, ["bash", "-c", script]), cwd=checkout, env={**slurm.environment, **given},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            print(f"$ {block}{done.stdout[-3000:]}{done.stderr[-2000:]}")
            assert done.returncode == 0, block
            for number, log in re.findall(r"(?:submitted |: )job (\d+); its log: (.*)", done.stdout):
                job = slurm.until(lambda number=number: ended(slurm, int(number)), 600, lambda: "the job does not end")
                print(Path(log).read_text()[-3000:] if Path(log).is_file() else "no log")
                assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0")
        assert (checkout / "work/report.html").is_file()
        assert (checkout / "work/report2.html").is_file()


def ended(slurm, number: int) -> dict[str, str] | None:
    """Return the fields of a job that has ended, else None."""
    job = slurm.job(number)
    return job if job["JobState"] in ENDED else None
