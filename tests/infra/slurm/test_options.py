"""Options of sbatch: time limits and GPUs as SLURM reads them."""

from __future__ import annotations

import math

import pytest

from infra.errors import UserError
from infra.slurm.options import check_values, gpus_asked, seconds_of


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("2", 120), ("2:30", 150), ("1:00:01", 3601), ("1-2", 93600), ("1-0:30", 88200), ("1-0:0:5", 86405),
        ("0", math.inf), ("UNLIMITED", math.inf), ("infinite", math.inf),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(time, seconds):
    assert seconds_of(time) == seconds


def test_a_time_limit_must_leave_time_before_the_signal():
    check_values({"time": "2:01", "signal": "USR1@120"})
    check_values({"time": "1"})
    with pytest.raises(UserError, match=r"time=1:30 is too short: the job is told to save 120 s before"):
        check_values({"time": "1:30", "signal": "USR1@120"})


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({}, None), ({"gres": "license:3"}, None), ({"gres": "gpu:h:4(S:0-1),shard:1"}, 4), ({"gpus-per-node": "a:1,b:2"}, 3),
        ({"gres": "gpu:h100"}, 1),
    ],
)  # fmt: skip
def test_the_gpus_of_a_node_are_counted(options, gpus):
    assert gpus_asked(options) == gpus


def test_gpus_that_are_asked_for_twice_are_refused():
    with pytest.raises(UserError, match="gpus-per-node=2 and gres=gpu:2 ask for GPUs twice"):
        gpus_asked({"gpus-per-node": "2", "gres": "gpu:2"})
