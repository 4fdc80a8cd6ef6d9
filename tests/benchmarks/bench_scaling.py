"""Weak and strong scaling over gloo: `python -m tests.benchmarks.bench_scaling [--quick] [--out FOLDER]`.

Steps of a small network on 1 to 8 processes of this machine, and on 2 and 3 hosts (network namespaces, as root) whose cards
have a limited bandwidth and delay (`tests.benchmarks.slow_network`). Weak: the same scans on each rank; strong: the same scans
in all. A step has four parts, each timed on its own, with a barrier before each exchange, so that waiting is told apart:

    compute      forward pass, loss and backward pass of the rank's scans, and the optimiser
    loss         gather of the embeddings of all ranks, and the scatter of their gradient (pretrain.losses.gather)
    gradients    one all_reduce of the flat gradient, as in data parallelism
    wait         until the slowest rank is there

Writes scaling.json and scaling.png. The whole plan takes about fifteen minutes on two idle cores; ranks beyond the cores share
them, so that `compute` grows with ranks / cores.
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
from contextlib import contextmanager
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
from tests.benchmarks.slow_network import INTERFACE, address_of, slow_hosts
from tests.netns import why_not

GRID, WIDTH, SCANS, WARM = (32, 32, 32), 0.25, 4, 2
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
        mbit, delay_ms: of the hosts' cards.
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
    local = [Case("weak", n, SCANS, 20) for n in ranks] + [Case("strong", n, 8 // n, 20) for n in ranks]
    links = ((10000.0, 0.1), (1000.0, 0.1), (1000.0, 5.0), (100.0, 1.0))
    kinds = (("weak", lambda n: SCANS), ("strong", lambda n: 12 // n))
    return local + [Case(kind, n, scans(n), 10, n, *link) for n in (2, 3) for link in links for kind, scans in kinds]


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


def steps_of_a_rank(case: Case, rank: int) -> list[dict[str, float]]:
    """Return the seconds of each part of each step."""
    recipe = load_recipe("demo-cpu", ["--encoder.name=resnet18", f"--encoder.options={{width: {WIDTH}, norm: group}}"])
    model, source = build_model(recipe), torch.Generator().manual_seed(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    views, ages = torch.randn(2, case.scans, 1, *GRID, generator=source), torch.rand(case.scans, 1, generator=source)
    kernel, ranks = KERNELS["gaussian"](bandwidth=5.0), gather.AllGather() if case.ranks > 1 else None
    measured = []
    for _ in range(WARM + case.steps):
        seconds = dict.fromkeys(PARTS, 0.0)
        started = time.perf_counter()
        with timed_exchange(seconds):
            embeddings, _ = model(views)
            y_aware_infonce(embeddings, ages, kernel=kernel, gather=ranks).backward()
        if case.ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            arrived = time.perf_counter()
            dist.barrier()
            met = time.perf_counter()
            dist.all_reduce(flat)
            seconds["wait"] += met - arrived
            seconds["gradients"] += time.perf_counter() - met
            parts = flat.div_(case.ranks).split([p.numel() for p in model.parameters() if p.grad is not None])
            for p, part in zip((p for p in model.parameters() if p.grad is not None), parts, strict=True):
                p.grad = part.view_as(p)
        optimizer.step()
        optimizer.zero_grad()
        whole = time.perf_counter() - started
        seconds["compute"] = whole - sum(seconds.values())
        measured.append({**seconds, "step": whole})
    return measured[WARM:]


def rank_main(case: Case, rank: int, master: str, port: int) -> None:
    """Be a rank: join the others, measure, and print the steps on one line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{master}:{port}", rank=rank, world_size=case.ranks)
    measured = steps_of_a_rank(case, rank)
    dist.barrier()
    print(json.dumps(measured), flush=True)
    dist.destroy_process_group()


def measure(case: Case) -> dict[str, Any]:
    """Run a case; return its median seconds by part, over steps and ranks, and the share of the exchange."""
    if case.hosts:
        with slow_hosts(case.hosts, mbit=case.mbit, delay_ms=case.delay_ms) as namespaces:
            return _measure(case, namespaces)
    return _measure(case, [])


def _measure(case: Case, namespaces: list[str]) -> dict[str, Any]:
    master, port = (address_of(0) if namespaces else "127.0.0.1"), free_port()
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE if namespaces else "lo", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(case.ranks):
        own = [
            sys.executable,
            "-m",
            "tests.benchmarks.bench_scaling",
            "--rank",
            json.dumps([asdict(case), rank, master, port]),
        ]
        enter = ["ip", "netns", "exec", namespaces[rank % case.hosts]] if namespaces else []
        started.append(
            subprocess.Popen(command_with_parent([*enter, *own]), stdout=subprocess.PIPE, env=variables, text=True)
        )
    steps: list[dict[str, float]] = []
    for process in started:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, f"a rank of {case} failed"
        steps += json.loads(out.splitlines()[-1])
    median = {part: statistics.median(step[part] for step in steps) for part in (*PARTS, "step")}
    exchanged = median["loss"] + median["gradients"]
    return {**asdict(case), "network": case.network, "seconds": median, "exchange_share": exchanged / median["step"]}


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the parts of a step by ranks: a row for weak and one for strong scaling, a column for each network."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    networks = [*dict.fromkeys(case["network"] for case in found if not case["hosts"]), "hosts"]
    figure, axes = plt.subplots(2, len(networks), figsize=(11, 7), squeeze=False)
    for row, kind in enumerate(("weak", "strong")):
        for column, network in enumerate(networks):
            cases = [
                c
                for c in found
                if c["kind"] == kind and (c["network"] == network or (network == "hosts" and c["hosts"]))
            ]
            labels = [str(c["ranks"]) if not c["hosts"] else c["network"].replace(", ", "\n") for c in cases]
            bottom = [0.0] * len(cases)
            for part in PARTS:
                heights = [1e3 * c["seconds"][part] for c in cases]
                axes[row][column].bar(labels, heights, bottom=bottom, label=part)
                bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
            axes[row][column].set_title(f"{kind}: {network}")
            axes[row][column].set_ylabel("ms per step")
            axes[row][column].tick_params(axis="x", labelsize=6 if network == "hosts" else 9)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    print(
        f"{'':<8}{'ranks':>6}{'scans':>6}  {'network':<32}"
        + "".join(f"{part:>11}" for part in (*PARTS, "step"))
        + "   exchange"
    )
    found = []
    for case in cases:
        found.append(measure(case))
        times = "".join(f"{1e3 * found[-1]['seconds'][part]:>8.1f} ms" for part in (*PARTS, "step"))
        share = f"{found[-1]['exchange_share']:>11.1%}"
        print(f"{case.kind:<8}{case.ranks:>6}{case.scans:>6}  {case.network:<32}{times}{share}", flush=True)
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    (chosen.out / "scaling.json").write_text(json.dumps({"machine": machine, "cases": found}, indent=1) + "\n")
    plot(found, chosen.out / "scaling.png")


if __name__ == "__main__":
    main()
