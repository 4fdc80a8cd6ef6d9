"""The forecast of memory and traffic against real ranks: resident memory and written bytes of whole steps over gloo."""

from __future__ import annotations

import pytest

from pretrain.config import load_recipe
from pretrain.forecast.hardware import GPUS
from pretrain.forecast.memory import MemoryModel
from pretrain.forecast.operations import plain_model
from pretrain.forecast.traffic import collectives_of_step, sent_bytes
from tests.distributed.deepspeed_cases import serve
from tests.distributed.ranks import Ranks
from tests.pretrain.forecast.forecast_cases import measured_step

WORLD, GRID, SCANS = 2, (48, 48, 48), 4
NETWORK = ("--encoder.name=resnet18", "--encoder.options={width: 0.375, norm: group}")
STAGE, GRAD_CACHE = "--deepspeed.zero_optimization.stage=", "--batch.micro=2"
CASES = {
    "stage 0": [STAGE + "0"], "stage 3": [STAGE + "3"], "stage 2, GradCache": [STAGE + "2", GRAD_CACHE],
    "stage 1": [STAGE + "1"], "stage 2": [STAGE + "2"], "stage 1, GradCache": [STAGE + "1", GRAD_CACHE],
    "stage 3, GradCache": [STAGE + "3", GRAD_CACHE],
}  # fmt: skip
IN_JOBS = list(CASES)[:3]
pytestmark = pytest.mark.distributed
EVERY_CASE = [pytest.param(case, marks=pytest.mark.jobs if case in IN_JOBS else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module")
def ranks():
    """Two ranks."""
    with Ranks(WORLD, serve) as pool:
        yield pool


@pytest.fixture(scope="module")
def measured(ranks):
    """Return a function: case -> bytes of memory and of traffic of both ranks. A case is measured once."""
    found = {}

    def of(case):
        if case not in found:
            found[case] = ranks.run(measured_step, WORLD, options=[*NETWORK, *CASES[case]], grid=GRID, scans=SCANS)
        return found[case]

    return of


def forecast(case):
    """Return the memory of a rank and the bytes that it sends, as forecast."""
    recipe = load_recipe("demo-cpu", [*NETWORK, *CASES[case]])
    recipe.batch.global_ = SCANS * WORLD
    parameters = sum(p.numel() for p in plain_model(recipe).parameters())
    model = MemoryModel(recipe, GRID, parameters, WORLD, gpu=GPUS["cpu"], loaded=1)
    sent = sent_bytes(collectives_of_step(recipe, parameters, SCANS, WORLD, "gloo"), WORLD, "gloo")
    return model.of_batch(SCANS), sum(sent.values())


@pytest.mark.parametrize("case", EVERY_CASE)
def test_memory_and_traffic_of_a_rank_are_forecast_within_ten_percent(case, measured):
    memory, sent = forecast(case)
    for used, written in measured(case):
        print(f"{case}: {used / 2**20:.1f} MiB measured, {memory.total / 2**20:.1f} forecast; "
              f"{written:,} bytes sent, {sent:,.0f} forecast")  # fmt: skip
        assert memory.total == pytest.approx(used, rel=0.1)
        assert sent == pytest.approx(written, rel=0.1)
        if GRAD_CACHE not in CASES[case]:
            assert memory.total - memory.parts["activations"] < 0.8 * used, "too small to show anything"
