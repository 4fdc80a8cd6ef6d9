"""The training engine on real ranks: ZeRO stage x precision x off-load, resume on the same ranks and on others.

Each run is compared with plain torch in a single process in float32, within the tolerance of its precision:

    precision       ZeRO stages   tolerance of the loss (relative)
    fp32            0 1 2 3       1e-5
    bf16            0 1 2 3       3e-3
    fp16              1 2 3       1e-3
    autocast        0 1 2 3       3e-3
    autocast-fp16   0             1e-3

The optimiser can be off-loaded under stages 1 to 3, parameters under stage 3. fp16 runs on the CPU with its check switched off,
on linear layers only; tests/gpu runs every precision on the real encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import load_recipe
from tests.distributed.deepspeed_cases import serve
from tests.distributed.engine_cases import Run, build, plain_steps, steps_on_ranks
from tests.distributed.ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

TOLERANCE = {"fp32": 1e-5, "bf16": 3e-3, "fp16": 1e-3, "autocast": 3e-3, "autocast-fp16": 1e-3}
STAGES = {
    "fp32": (0, 1, 2, 3),
    "bf16": (0, 1, 2, 3),
    "fp16": (1, 2, 3),
    "autocast": (0, 1, 2, 3),
    "autocast-fp16": (0,),
}
OPTIMIZER, PARAMETERS = "offload_optimizer: {device: cpu}", "offload_param: {device: cpu}"
TABLE = [(precision, stage, "") for precision, stages in STAGES.items() for stage in stages]
TABLE += [(precision, stage, OPTIMIZER) for precision in ("fp32", "bf16", "fp16") for stage in (1, 2, 3)]
TABLE += [(precision, 3, f"{OPTIMIZER}, {PARAMETERS}") for precision in ("fp32", "bf16", "fp16")]
QUICK = [("fp32", 0, ""), ("fp32", 1, ""), ("fp32", 2, ""), ("fp32", 3, ""), ("bf16", 0, ""), ("bf16", 1, ""),
         ("fp16", 2, ""), ("autocast-fp16", 0, ""), ("fp32", 2, OPTIMIZER),
         ("bf16", 3, f"{OPTIMIZER}, {PARAMETERS}")]  # fmt: skip
# Everything that a checkpoint may contain: several learning rates, a learned temperature, a weight average.
EVERYTHING = ("--optimizer.layer_decay=0.7", "--loss.temperature_bounds=[0.01, 1.0]", "--train.ema_decay=0.9")


def zero(stage: int, more: str = "") -> str:
    """The override for a ZeRO stage, with a threshold at which stage 3 partitions every parameter."""
    rest = f", {more}" if more else ""
    return f"--deepspeed={{zero_optimization: {{stage: {stage}, stage3_param_persistence_threshold: 0{rest}}}}}"


def quick_or_slow(rows: list[Any], quick: list[Any]) -> list[Any]:
    assert all(row in rows for row in quick)
    return [pytest.param(*row, marks=[] if row in quick else pytest.mark.slow) for row in rows]


def losses(result: dict[str, Any]) -> list[float]:
    return [metrics["loss"] for metrics in result["metrics"]]


class Pools:
    """One pool of processes per world size, started at first use."""

    def __init__(self) -> None:
        self._pools: dict[int, Ranks] = {}

    def run(self, ranks: int, runs: list[Run]) -> list[dict[str, Any]]:
        """Return the results of rank 0; the losses of the other ranks must be equal."""
        if ranks not in self._pools:
            self._pools[ranks] = Ranks(ranks, serve)
        results = self._pools[ranks].run(steps_on_ranks, ranks, runs=runs)
        for other in results[1:]:
            assert [losses(run) for run in other] == [losses(run) for run in results[0]]
        first: list[dict[str, Any]] = results[0]
        return first

    def close(self) -> None:
        for pool in self._pools.values():
            pool.ask_to_end()
        for pool in self._pools.values():
            pool.__exit__()


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    started = Pools()
    yield started
    started.close()


@pytest.fixture(scope="module")
def plain() -> list[dict[str, float]]:
    return plain_steps((), 6)


@pytest.mark.parametrize(("precision", "stage", "offload"), quick_or_slow(TABLE, QUICK))
def test_two_ranks_train_like_one_float32_process_and_resume_bit_for_bit(
    pools: Pools, plain: list[dict[str, float]], tmp_path: Path, precision: str, stage: int, offload: str
) -> None:
    options = (zero(stage, offload), f"--train.precision={precision}", "--deepspeed.gradient_clipping=1000")
    whole, resumed = pools.run(2, [Run(options, save=tmp_path), Run(options, load=tmp_path)])
    expected = [metrics["loss"] for metrics in plain]
    assert losses(whole) == pytest.approx(expected, rel=TOLERANCE[precision])
    assert expected[4] < expected[0]
    assert losses(whole)[4] < losses(whole)[0]
    if precision != "fp32":
        assert losses(whole) != pytest.approx(expected, rel=1e-7), "the precision changed nothing"
    for found, expected_step in zip(whole["metrics"], plain, strict=True):
        assert found["grad_norm"] == pytest.approx(expected_step["grad_norm"], rel=30 * TOLERANCE[precision])
    assert resumed["metrics"] == whole["metrics"][3:]
    assert all(torch.equal(resumed["encoder"][name], value) for name, value in whole["encoder"].items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_bucket_of_the_network_changes_no_bit(pools: Pools, stage: int) -> None:
    parameters = sum(p.numel() for p in build(load_recipe("demo-cpu", [])).parameters())
    fitted, reserved, split = pools.run(
        2,
        [Run((zero(stage),)), *(Run((zero(stage, f"reduce_bucket_size: {size}"),)) for size in (500_000_000, 150))],
    )
    assert [run["bucket"] for run in (fitted, reserved, split)] == [parameters, 500_000_000, 150]
    for other in (reserved, split):  # two ranks: the sum of a gradient does not depend on where it is cut
        assert other["metrics"] == fitted["metrics"]
        assert all(torch.equal(other["encoder"][name], value) for name, value in fitted["encoder"].items())


OPTIMISERS = ["adamw", "sgd", "lamb", "lars"]


@pytest.mark.parametrize(
    ("name", "stage"),
    quick_or_slow([(n, s) for n in OPTIMISERS for s in range(4)], [("adamw", 1), ("sgd", 2), ("lamb", 1), ("lars", 3)]),
)
def test_every_optimiser_takes_the_same_steps_under_every_stage(
    pools: Pools, tmp_path: Path, name: str, stage: int
) -> None:
    # The steps of LARS are a thousandth of the norm of a layer.
    lr = {"lars": 5.0, "sgd": 0.05}.get(name, 5e-3)
    options = (f"--optimizer.name={name}", f"--optimizer.lr={lr}", "--optimizer.layer_decay=0.7",
               "--optimizer.weight_decay=0.01", "--deepspeed.gradient_clipping=0.5")  # fmt: skip
    expected = [metrics["loss"] for metrics in plain_steps(options, 6)]
    overrides = (options[0], zero(stage), *options[1:])
    whole, resumed = pools.run(2, [Run(overrides, save=tmp_path), Run(overrides, load=tmp_path)])
    assert losses(whole) == pytest.approx(expected, rel=1e-5)
    assert resumed["metrics"] == whole["metrics"][3:]
    assert abs(expected[5] - expected[1]) > 1e-3, "the optimiser did nothing"


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_gradient_with_a_larger_norm_is_clipped(pools: Pools, stage: int) -> None:
    options = (zero(stage), "--deepspeed.gradient_clipping=0.05", "--optimizer.name=sgd", "--optimizer.lr=0.5")
    clipped = plain_steps(options, 4)
    free = plain_steps(options[2:], 4)
    [found] = pools.run(2, [Run(options, last=4)])
    assert losses(found) == pytest.approx([metrics["loss"] for metrics in clipped], rel=1e-5)
    assert abs(clipped[3]["loss"] - free[3]["loss"]) > 1e-3
    # The logged norm is that before clipping.
    assert found["metrics"][0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-4)
    assert free[0]["grad_norm"] > 0.05


@pytest.mark.parametrize(
    ("precision", "stage"),
    quick_or_slow([("fp16", 1), ("fp16", 2), ("fp16", 3), ("autocast-fp16", 0)], [("fp16", 2), ("autocast-fp16", 0)]),
)
def test_a_step_that_overflows_is_skipped_and_counted(pools: Pools, tmp_path: Path, precision: str, stage: int) -> None:
    options = (zero(stage), f"--train.precision={precision}")
    if precision == "fp16":
        options += ("--deepspeed.fp16={hysteresis: 1, initial_scale_power: 10}",)
    [found] = pools.run(2, [Run(options, overflow_at=(2,), save=tmp_path, save_at=4)])
    metrics = found["metrics"]
    assert [step["skipped_steps"] for step in metrics] == [0, 0, 1, 1, 1, 1]
    assert metrics[3]["loss_scale"] == metrics[2]["loss_scale"] / 2
    assert "grad_norm" not in metrics[2]
    assert "grad_norm" in metrics[3]
    # The data and the schedule advance in a skipped step; the weights do not change.
    assert [step["lr"] for step in metrics] == pytest.approx([step["lr"] for step in plain_steps((), 6)])
    [resumed] = pools.run(2, [Run(options, load=tmp_path)])
    assert resumed["metrics"] == metrics[4:]


def test_a_gradient_that_is_never_finite_stops_even_fp16(pools: Pools) -> None:
    scaled = "--deepspeed.fp16={initial_scale_power: 1, hysteresis: 1}"
    always = tuple(range(40))
    zeroed, plain, exact = pools.run(
        2,
        [
            Run((zero(1), "--train.precision=fp16", scaled), last=40, overflow_at=always),
            Run((zero(0), "--train.precision=autocast-fp16"), last=40, overflow_at=always),
            Run((zero(1), "--train.precision=bf16"), last=40, overflow_at=(2,)),
        ],
    )
    assert zeroed["stopped"] == "step 1: the gradient is not finite at the smallest loss scale"
    assert plain["stopped"] == "step 30: the gradient was not finite in 31 steps in a row, whatever the loss scale"
    assert exact["stopped"] == "step 2: the gradient is not finite"


EVERYWHERE = [(ranks, stage) for ranks in (1, 2, 3) for stage in range(4)]
MOVES = [(was, now) for was in EVERYWHERE for now in EVERYWHERE if was != now]
QUICK_MOVES = [((2, 0), (3, 3)), ((2, 1), (1, 0)), ((2, 2), (3, 1)), ((2, 3), (1, 2)), ((1, 3), (2, 0))]


class Sources:
    """Checkpoints of runs with EVERYTHING, by ranks and stage, each written once."""

    def __init__(self, pools: Pools, folder: Path) -> None:
        self._pools, self._folder = pools, folder
        self._made: dict[tuple[int, int], dict[str, Any]] = {}
        self.losses = [metrics["loss"] for metrics in plain_steps(EVERYTHING, 6)]

    def get(self, ranks: int, stage: int) -> tuple[Path, dict[str, Any]]:
        folder = self._folder / f"{ranks}-{stage}"
        if (ranks, stage) not in self._made:
            [self._made[ranks, stage]] = self._pools.run(ranks, [Run((zero(stage), *EVERYTHING), save=folder)])
        return folder, self._made[ranks, stage]


@pytest.fixture(scope="module")
def sources(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(pools, tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(("was", "now"), quick_or_slow(MOVES, QUICK_MOVES))
def test_a_run_resumes_on_other_ranks_and_under_another_stage(
    pools: Pools, sources: Sources, was: tuple[int, int], now: tuple[int, int]
) -> None:
    folder, whole = sources.get(*was)
    [resumed] = pools.run(now[0], [Run((zero(now[1]), *EVERYTHING), load=folder)])
    assert [metrics["step"] for metrics in resumed["metrics"]] == [3, 4, 5]
    assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=1e-5)
    assert losses(resumed) == pytest.approx(sources.losses[3:], rel=1e-5)
    for key in ("lr", "temperature"):
        assert [f[key] for f in resumed["metrics"]] == pytest.approx([f[key] for f in whole["metrics"][3:]], rel=1e-5)
    assert resumed["rates"] == pytest.approx(whole["rates"])
    assert len(resumed["rates"]) == 5
    for name, value in whole["encoder"].items():
        torch.testing.assert_close(resumed["encoder"][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(resumed["average"][name], whole["average"][name], rtol=1e-4, atol=1e-5)
    assert float(resumed["encoder"]["passes"]) == 6.0
    assert not list(folder.glob(".unfinished*"))


SCALE_1024 = "--deepspeed.fp16={initial_scale_power: 10}"
SUMMED = "--deepspeed.data_types={grad_accum_dtype: fp32}"  # under stage 1 this selects BF16_Optimizer


@pytest.mark.parametrize(
    ("options", "was", "now"),
    [
        (("--optimizer.name=lamb", "--optimizer.weight_decay=0.01"), (2, 1), (1, 3)),
        (("--optimizer.name=sgd", "--optimizer.lr=0.05"), (2, 3), (3, 0)),
        pytest.param(("--optimizer.name=lars", "--optimizer.lr=5.0"), (2, 2), (3, 3), marks=pytest.mark.slow),
        pytest.param(("--optimizer.name=adamw", "--train.precision=bf16"), (2, 0), (1, 3), marks=pytest.mark.slow),
        pytest.param(("--train.precision=bf16",), (2, 1), (3, 0), marks=pytest.mark.slow),
        pytest.param(("--train.precision=bf16", SUMMED), (2, 1), (3, 3), marks=pytest.mark.slow),
        pytest.param(("--train.precision=bf16", SUMMED), (3, 2), (2, 1), marks=pytest.mark.slow),
        # At DeepSpeed's initial scale, 2^16, the sum over three ranks overflows, but the sum over two does not.
        pytest.param(("--train.precision=fp16", SCALE_1024), (2, 3), (3, 1), marks=pytest.mark.slow),
        pytest.param(("--train.precision=autocast",), (3, 3), (2, 0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_state_of_every_optimiser_and_precision_is_resharded(
    pools: Pools, tmp_path: Path, options: tuple[str, ...], was: tuple[int, int], now: tuple[int, int]
) -> None:
    [whole] = pools.run(was[0], [Run((zero(was[1]), *options), save=tmp_path)])
    [resumed] = pools.run(now[0], [Run((zero(now[1]), *options), load=tmp_path)])
    exact = not any("precision" in option for option in options)
    # In 16 bits, each rank rounds the sum over its own part of the batch.
    assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=1e-5 if exact else 2e-3)
    if "--train.precision=fp16" in options:
        assert {f["loss_scale"] for f in (*resumed["metrics"], *whole["metrics"])} == {1024.0}


def test_off_load_and_the_groups_of_stage_3_may_change_at_a_resume(pools: Pools, sources: Sources) -> None:
    folder, whole = sources.get(2, 3)
    options = zero(3, f"{OPTIMIZER}, sub_group_size: 100")
    [resumed] = pools.run(2, [Run((options, *EVERYTHING), load=folder)])
    assert losses(resumed) == pytest.approx(losses(whole)[3:], rel=1e-5)


def test_the_average_follows_its_formula_and_resumes_bit_for_bit(pools: Pools, tmp_path: Path) -> None:
    options = ("--train.ema_decay=0.3",)
    for stage in (2, 3):
        here, folder = (zero(stage), *options), tmp_path / str(stage)
        runs = [Run(here, last=n) for n in (1, 2, 3)]
        *parts, whole, resumed = pools.run(2, [*runs, Run(here, save=folder, save_at=2), Run(here, load=folder)])
        name = "trunk.layer1.0.weight"
        first, second, third = (part["encoder"][name] for part in parts)
        average = first + (second - first) * (1 - 1 / 11)
        average = average + (third - average) * (1 - 2 / 12)
        torch.testing.assert_close(parts[2]["average"][name], average)
        assert not torch.allclose(average, third, atol=1e-6)
        assert all(torch.equal(resumed["average"][n], value) for n, value in whole["average"].items())
