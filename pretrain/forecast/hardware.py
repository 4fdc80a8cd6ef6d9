"""What a plan assumes about GPUs: peaks, memory and bandwidths of the makers' data sheets, and the share that a run reaches."""

from __future__ import annotations

from dataclasses import dataclass

from infra.errors import UserError, nearest

# Share of the peak that a run reaches: DenseNet121 on one H200 with loader and augmentation, in TF32 (52.9 scans/s) and in bf16
# (54.3 scans/s; docs/benchmarks/h200.md). Its convolutions have few channels; ViT-large reached 0.115 in bf16.
UTILISATION_FP32, UTILISATION_16_BITS = 0.055, 0.028
LINK_SHARE = 0.8  # of a link's bandwidth that collectives reach; assumed
# Seconds that every step of a collective between GPUs of one host, and between hosts, waits before its first byte. Assumed.
LATENCY_INSIDE, LATENCY_BETWEEN = 5e-6, 20e-6
# Of a GPU's memory, what a plan leaves to the CUDA context and the libraries, in bytes, and to fragmentation, as a share.
CONTEXT, FRAGMENTATION = 1.5 * 2**30, 0.05


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, or a CPU rank.

    Attributes:
        memory: bytes.
        float32, tf32, bits16: dense peak in 10^12 operations per second; convolutions in float32 run in tf32 if it is allowed.
        inside: bytes per second that a GPU sends to the others of its host (NVLink or PCIe), one direction.
        network: bytes per second that a GPU sends to other hosts, one direction: the usual network card per GPU.
        lazy: memory is taken when it is first written, as on a CPU, and not when it is reserved.
    """

    memory: float
    float32: float
    tf32: float
    bits16: float
    inside: float
    network: float
    lazy: bool = False

    def peak(self, precision: str, tf32: bool = True) -> float:
        """Return the peak of a ``train.precision``, in operations per second."""
        if precision != "fp32":
            return 1e12 * self.bits16
        return 1e12 * (self.tf32 if tf32 else self.float32)

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory if self.lazy else (self.memory - CONTEXT) * (1 - FRAGMENTATION)


GB = 1e9
# Data sheets say GB and mean GiB. The driver keeps half a percent (an H200 of 141 has 143,771 MiB), ECC a sixteenth of an L40S.
GIB, L40S = 0.995 * 2**30, 0.9375 * 2**30
GPUS = {
    "b200": Gpu(180 * GIB, 75, 1100, 2250, 900 * GB, 50 * GB),
    "h200": Gpu(141 * GIB, 67, 494, 989, 450 * GB, 50 * GB),
    "h100": Gpu(80 * GIB, 67, 494, 989, 450 * GB, 50 * GB),
    "a100": Gpu(80 * GIB, 19.5, 156, 312, 300 * GB, 25 * GB),
    "a100-40gb": Gpu(40 * GIB, 19.5, 156, 312, 300 * GB, 25 * GB),
    "l40s": Gpu(48 * L40S, 91.6, 183, 362, 32 * GB, 12.5 * GB),
    "v100": Gpu(32 * GIB, 15.7, 15.7, 125, 150 * GB, 12.5 * GB),
    # A rank on two cores over gloo, for rehearsals and tests.
    "cpu": Gpu(8 * GB, 0.1, 0.1, 0.1, 1 * GB, 1.25 * GB, lazy=True),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Return a kind of GPU, by its name in any case; raises UserError, naming the kinds, if it is not known."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu={name} is not known{nearest(name.lower(), GPUS)}; allowed: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def link_seconds(sent: float, steps: int, gpu: Gpu, nodes: int) -> float:
    """Return the seconds in which a rank sends ``sent`` bytes in ``steps`` messages, one after another.

    With several hosts the ring passes through the network, whose cards are the slowest links.
    """
    bandwidth = gpu.inside if nodes == 1 else min(gpu.inside, gpu.network)
    return sent / (bandwidth * LINK_SHARE) + steps * (LATENCY_INSIDE if nodes == 1 else LATENCY_BETWEEN)
