"""Weak and strong scaling over gloo: `python -m tests.benchmarks.bench_scaling [--quick] [--out FOLDER]`.

Steps of a small network on 1 to 8 processes of this machine, and on 2 and 3 hosts (network namespaces, as root) whose cards
have a limited bandwidth and delay (`tests.benchmarks.slow_network`; what a link reaches is measured and printed). Weak: the
same scans on each rank; strong: the same scans in all. Each case is run twice:

1. as in training: seconds of a whole step;
2. with a barrier before each exchange, so that an exchange is not mixed up with waiting for the slowest rank:

    compute      forward pass, loss and backward pass of the rank's scans, and the optimiser
    loss         gather of the embeddings of all ranks, and the scatter of their gradient (pretrain.losses.gather)
    gradients    one all_reduce of the flat gradient, as in data parallelism
    wait         until the slowest rank is there; it holds the barriers' own time on the network, which training does not have

The share of the exchange is (loss + gradients) / (compute + loss + gradients), the median over steps and ranks.

Writes scaling.json, after every case, and scaling.png. A case that fails is named, and the others go on. The whole plan takes
about fifteen minutes on two idle cores; ranks beyond the cores share them, so that `compute` grows with ranks / cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra.distributed import free_port
from infra.processes.with_parent import command_with_parent
from pretrain.config import load_recipe
from pretrain.kernels import KERNELS
from pretrain.losses import gather
from pretrain.losses.contrastive import y_aware_infonce
from pretrain.model import build_model
from tests.benchmarks.slow_network import INTERFACE, address_of, reached, slow_hosts
from tests.netns import why_not

GRID, WIDTH, WARM = (32, 32, 32), 0.25, 2
SCANS, TOGETHER = 4, 24  # of a rank in weak scaling, of all ranks in strong scaling
PARTS = ("compute", "loss", "gradients", "wait")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        kind: "weak" or "strong".
        ranks: number of ranks.
        scans: scans of a rank.
        steps: steps that are measured.
        hosts: 0 for processes of this machine, or the number of hosts.
        mbit, delay_ms: of the hosts' cards, as asked.
    """

    kind: str
    ranks: int
    scans: int
    steps: int
    hosts: int = 0
    mbit: float = 0.0
    delay_ms: float = 0.0

    @property
    def network(self) -> str:
        """The network in words."""
        return f"{self.hosts} hosts, {self.mbit:g} Mbit/s, {self.delay_ms:g} ms" if self.hosts else "one machine"


def plan(quick: bool) -> list[Case]:
    """Return the measurements."""
    if quick:
        return [
            Case("weak", 1, 2, 2),
            Case("weak", 2, 2, 2),
            Case("strong", 2, 1, 2),
            Case("weak", 2, 2, 2, hosts=2, mbit=1000, delay_ms=1),
        ]
    ranks = (1, 2, 4, 8)
    local = [Case("weak", n, SCANS, 20) for n in ranks] + [Case("strong", n, TOGETHER // n, 20) for n in ranks]
    links = ((10000.0, 0.1), (1000.0, 0.1), (1000.0, 5.0), (100.0, 1.0))
    scans = {"weak": lambda n: SCANS, "strong": lambda n: TOGETHER // n}
    return local + [Case(kind, n, of(n), 10, n, *link) for link in links for n in (2, 3) for kind, of in scans.items()]


@contextmanager
def timed_exchange(seconds: dict[str, float]) -> Iterator[None]:
    """Time the collectives of the loss, and the wait before them, within the block."""
    originals = gather._all_gather_flat, dist.all_to_all_single

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            dist.barrier()
            met = time.perf_counter()
            result = collective(*arguments, **options)
            seconds["wait"] += met - started
            seconds["loss"] += time.perf_counter() - met
            return result

        return call

    gather._all_gather_flat, dist.all_to_all_single = (timed(original) for original in originals)
    try:
        yield
    finally:
        gather._all_gather_flat, dist.all_to_all_single = originals


def steps_of_a_rank(case: Case, rank: int, *, parts: bool) -> list[dict[str, float]]:
    """Return the seconds of each step, and with ``parts`` those of its parts, between barriers."""
    recipe = load_recipe("demo-cpu", ["--encoder.name=resnet18", f"--encoder.options={{width: {WIDTH}, norm: group}}"])
    model, source = build_model(recipe), torch.Generator().manual_seed(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    views, ages = torch.randn(2, case.scans, 1, *GRID, generator=source), torch.rand(case.scans, 1, generator=source)
    kernel, ranks = KERNELS["gaussian"](bandwidth=5.0), gather.AllGather() if case.ranks > 1 else None
    measured = []
    for _ in range(WARM + case.steps):
        seconds = dict.fromkeys(PARTS, 0.0)
        if case.ranks > 1:
            dist.barrier()  # a step begins on all ranks at a time
        started, used = time.perf_counter(), time.process_time()
        with timed_exchange(seconds) if parts else nullcontext():
            embeddings, _ = model(views)
            y_aware_infonce(embeddings, ages, kernel=kernel, gather=ranks).backward()
        if case.ranks > 1:
            trained = [p for p in model.parameters() if p.grad is not None]
            flat = torch.cat([p.grad.flatten() for p in trained])
            _reduce(flat, seconds, parts=parts)
            for p, part in zip(trained, flat.div_(case.ranks).split([p.numel() for p in trained]), strict=True):
                p.grad = part.view_as(p)
        optimizer.step()
        optimizer.zero_grad()
        whole = time.perf_counter() - started
        seconds["compute"] = whole - sum(seconds.values())
        cpu = time.process_time() - used
        measured.append({**seconds, "step": whole, "cpu": cpu} if parts else {"step": whole, "cpu": cpu})
    return measured[WARM:]


def _reduce(flat: torch.Tensor, seconds: dict[str, float], *, parts: bool) -> None:
    """Sum the gradients of all ranks."""
    arrived = time.perf_counter()
    if parts:
        dist.barrier()
    met = time.perf_counter()
    dist.all_reduce(flat)
    seconds["wait"] += met - arrived
    seconds["gradients"] += time.perf_counter() - met


def rank_main(case: Case, rank: int, master: str, port: int) -> None:
    """Be a rank: join the others, measure, and print the steps of both runs on one line."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"tcp://{master}:{port}", rank=rank, world_size=case.ranks)
    measured = [steps_of_a_rank(case, rank, parts=parts) for parts in (False, True)]
    dist.barrier()
    print(json.dumps(measured), flush=True)
    dist.destroy_process_group()


def measure(case: Case) -> dict[str, Any]:
    """Run a case; return its median seconds over steps and ranks, the share of the exchange, and what its link reaches."""
    if case.hosts:
        with slow_hosts(case.hosts, mbit=case.mbit, delay_ms=case.delay_ms) as namespaces:
            return {**_measure(case, namespaces), "link": reached(namespaces, mbit=case.mbit)}
    return _measure(case, [])


def _measure(case: Case, namespaces: list[str]) -> dict[str, Any]:
    master, port = (address_of(0) if namespaces else "127.0.0.1"), free_port()
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE if namespaces else "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.bench_scaling", "--rank"]
    started = []
    try:
        for rank in range(case.ranks):
            enter = ["ip", "netns", "exec", namespaces[rank % case.hosts]] if namespaces else []
            words = [*enter, *command, json.dumps([asdict(case), rank, master, port])]
            started.append(
                subprocess.Popen(command_with_parent(words), stdout=subprocess.PIPE, env=variables, text=True)
            )
        outputs = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise RuntimeError(f"ranks ended with {[process.returncode for process in started]}")
    both = [json.loads(out.splitlines()[-1]) for out in outputs]
    whole, steps = ([step for runs in both for step in runs[run]] for run in (0, 1))
    median = {part: statistics.median(step[part] for step in steps) for part in PARTS}
    median["step"] = statistics.median(step["step"] for step in whole)
    shares = [(s["loss"] + s["gradients"]) / (s["compute"] + s["loss"] + s["gradients"]) for s in steps]
    return {**asdict(case), "network": case.network, "seconds": median, "exchange_share": statistics.median(shares)}


def add_speed_ups(found: list[dict[str, Any]]) -> None:
    """Add to each case how many times the scans of a second it makes, compared with one rank of its kind."""
    rates = [case["ranks"] * case["scans"] / case["seconds"]["step"] for case in found]
    alone = {case["kind"]: rate for case, rate in zip(found, rates, strict=True) if case["ranks"] == 1}
    for case, rate in zip(found, rates, strict=True):
        if case["kind"] in alone:
            case["speed_up"] = rate / alone[case["kind"]]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the parts of a step by ranks: a row for weak and one for strong scaling, a column for each network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), squeeze=False, width_ratios=(1, 2))
    for row, kind in enumerate(("weak", "strong")):
        for column, hosts in enumerate((False, True)):
            cases = [case for case in found if case["kind"] == kind and bool(case["hosts"]) == hosts]
            axis, bottom = axes[row][column], [0.0] * len(cases)
            labels = [_label(case) for case in cases]
            for part in PARTS:
                heights = [1e3 * case["seconds"][part] for case in cases]
                axis.bar(labels, heights, bottom=bottom, label=part)
                bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
            for place, (case, top) in enumerate(zip(cases, bottom, strict=True)):
                speed = f"\n{case['speed_up']:.1f}x" if "speed_up" in case else ""
                axis.text(place, top, f"{case['exchange_share']:.0%}{speed}", ha="center", va="bottom", fontsize=7)
            steps = [1e3 * case["seconds"]["step"] for case in cases]
            axis.scatter(labels, steps, color="black", marker="_", s=200, label="whole step, without barriers")
            axis.set_ylim(0, 1.2 * max([1e-9, *bottom, *steps]))
            axis.set_title(f"{kind} scaling, {'hosts' if hosts else 'processes of one machine'}")
            axis.set_ylabel("ms per step")
            axis.tick_params(axis="x", labelsize=6 if hosts else 9)
    axes[0][0].legend(fontsize=8)
    figure.text(
        0.5, 0.005, "over the bars: share of the exchange; scans/s as a multiple of one rank's", ha="center", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(case: dict[str, Any]) -> str:
    if not case["hosts"]:
        return str(case["ranks"])
    return f"{case['hosts']} hosts\n{case['link']['mbit']:.0f} Mbit/s\n{case['link']['round_trip_ms']:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny plan, to check that it runs")
    parser.add_argument(
        "--only", choices=("local", "network"), help="only the processes of one machine, or only the hosts"
    )
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="folder of scaling.json and scaling.png")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank:
        case, rank, master, port = json.loads(chosen.rank)
        rank_main(Case(**case), rank, master, port)
        return
    cases = [c for c in plan(chosen.quick) if chosen.only in (None, "network" if c.hosts else "local")]
    if (reason := why_not()) is not None:
        print(f"without hosts: {reason}")
        cases = [case for case in cases if not case.hosts]
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{'':<8}{'ranks':>6}{'scans':>6}  {'network':<32}" + "".join(f"{part:>11}" for part in (*PARTS, "step"))
          + "   exchange   speed-up")  # fmt: skip
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    found, failed = list[dict[str, Any]](), list[str]()
    for case in cases:
        try:
            found.append(measure(case))
        except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
            failed.append(f"{case.kind}, {case.ranks} ranks, {case.network}: {error}")
            print(failed[-1], flush=True)
            continue
        add_speed_ups(found)
        print(_line(found[-1]), flush=True)
        content = {"machine": machine, "load": os.getloadavg()[0], "cases": found, "failed": failed}
        (chosen.out / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(found, chosen.out / "scaling.png")
    if failed:
        sys.exit(f"{len(failed)} of {len(cases)} cases failed")


def _line(case: dict[str, Any]) -> str:
    times = "".join(f"{1e3 * case['seconds'][part]:>8.1f} ms" for part in (*PARTS, "step"))
    speed = f"{case['speed_up']:>10.2f}x" if "speed_up" in case else ""
    link = case.get("link")
    told = "" if link is None else f"   (reached: {link['mbit']:.0f} Mbit/s, round trip {link['round_trip_ms']:.2f} ms)"
    return (f"{case['kind']:<8}{case['ranks']:>6}{case['scans']:>6}  {case['network']:<32}{times}"
            f"{case['exchange_share']:>11.1%}{speed}{told}")  # fmt: skip


if __name__ == "__main__":
    main()
