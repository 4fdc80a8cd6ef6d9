"""The memory of a rank by part, and the largest batch that fits.

Weights, gradients and optimiser are computed (Rajbhandari et al. 2020, arXiv:1910.02054, with what DeepSpeed 0.19 holds beside
them); the activations and the loss are counted in a run on fake tensors (`pretrain.forecast.fake_pass`). Of the parts that do
not live at the same time, the largest phase counts:

    loss          activations, the gathered features, the loss's own tensors
    backward      activations, and what the backward pass makes: gradients too, if they are kept
    reduction     all gradients, their bucket, and the bucket's flat copy that is sent
    step          this rank's gradients in float32, and the optimiser's temporary tensors

N = parameters, W = ranks, B = scans of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Recipe
from pretrain.engine.deepspeed_config import reduce_bucket_size, zero_stage
from pretrain.forecast.fake_pass import PassMemory, loss_pass, network_pass
from pretrain.forecast.hardware import Gpu
from pretrain.forecast.operations import memory_of_a_rank
from pretrain.forecast.traffic import MAX_LIVE, record_bytes, width_of

# Flat tensors of float32 that the optimisers of torch make in a step, beside gradient and state.
STEP_TENSORS = 2
LARGEST_SEARCHED = 2048


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at its largest moment.

    Attributes:
        parts: bytes by part; their sum is the memory of the rank.
        phase: the moment: ``loss``, ``backward``, ``reduction`` or ``step``.
    """

    parts: dict[str, float]
    phase: str

    @property
    def total(self) -> float:
        """Bytes of the rank, without the libraries and the CUDA context."""
        return sum(self.parts.values())


class MemoryModel:
    """The memory of a rank of a recipe as a function of its batch; the network runs twice on fake tensors, whatever the batch.

    Args:
        recipe: the recipe; its ``batch.micro`` counts, its ``batch.global`` does not.
        grid: voxels of a scan, (D, H, W).
        parameters: parameters of the network.
        ranks: ranks of the job.
        gpu: the kind of GPU.
        loaded: batches of volumes that a rank holds: one in training, and those that the loader prepares.
    """

    def __init__(
        self, recipe: Recipe, grid: Sequence[int], parameters: int, ranks: int, *, gpu: Gpu, loaded: int
    ) -> None:
        self.recipe, self.grid, self.parameters, self.ranks = recipe, list(grid), parameters, ranks
        self.gpu, self.loaded = gpu, loaded
        self.stage, self.width = zero_stage(recipe), width_of(recipe)
        self._cached: dict[tuple[int, bool], PassMemory] = {}
        self.bucket = float(self.width * reduce_bucket_size(recipe, parameters))

    def for_ranks(self, recipe: Recipe, ranks: int) -> MemoryModel:
        """Return the model of the same network on another number of ranks, which does not count its passes again."""
        other = MemoryModel(recipe, self.grid, self.parameters, ranks, gpu=self.gpu, loaded=self.loaded)
        other._cached = self._cached
        return other

    def network(self, scans: int, keep_gradients: bool) -> PassMemory:
        """Return the memory of the network's pass: counted for one and two scans, and the same growth for every further one."""
        for few in (1, 2):
            if (few, keep_gradients) not in self._cached:
                self._cached[few, keep_gradients] = network_pass(
                    self.recipe, self.grid, few, keep_gradients=keep_gradients, on_gpu=not self.gpu.lazy
                )
        one, two = (self._cached[few, keep_gradients] for few in (1, 2))
        grown = {key: value + (scans - 1) * (getattr(two, key) - value) for key, value in vars(one).items()}
        return PassMemory(**grown)

    def of_batch(self, scans: int) -> RankMemory:
        """Return the memory of a rank that holds ``scans`` scans per step."""
        phases = self._phases(scans)
        phase = max(phases, key=lambda name: sum(phases[name].values()))
        parts = {**self._static(scans), **phases[phase]}
        return RankMemory({name: size for name, size in parts.items() if size}, phase)

    def _micro(self, scans: int) -> int:
        return min(self.recipe.batch.micro or scans, scans)

    def _static(self, scans: int) -> dict[str, float]:
        """What a rank holds through the whole step."""
        held, width = memory_of_a_rank(self.recipe, self.parameters, self.ranks), self.width
        voxels = self.grid[0] * self.grid[1] * self.grid[2]
        micro = self._micro(scans)
        # The network's own copy of its input: in 16 bits, or of a micro-batch, whose views do not lie together.
        copied = 2.0 * width * voxels * (micro if micro < scans else scans if width == 2 else 0)
        gathered = float(width * min(self.parameters, MAX_LIVE)) if self.stage == 3 else 0.0
        # Stage 3 keeps its bucket and this rank's gradients from step to step; the others make a bucket in every backward pass.
        bucket = (
            self.bucket if not self.gpu.lazy else min(self.bucket, width * self.parameters) if self.stage == 3 else 0.0
        )
        return {
            "weights": held["weights"] + gathered,
            "optimizer": held["optimizer"],
            "volumes": self.loaded * 2 * scans * voxels * 4.0 + copied,
            # Embeddings, and their gradients, between GradCache's two passes.
            "grad cache": 2.0 * scans * record_bytes(self.recipe)[0] if micro < scans else 0.0,
            "own gradients": held["gradients"] if self.stage == 3 else 0.0,
            "buffers": bucket if self.stage else 0.0,
        }

    def _phases(self, scans: int) -> dict[str, dict[str, float]]:
        """What lives at each moment beside the static parts."""
        cached, whole, lazy = self._micro(scans) < scans, float(self.width * self.parameters), self.gpu.lazy
        # Stage 3 frees gradients only when it reduces its bucket; a lazy bucket grows as they are freed.
        keep = self.stage == 3 or ((self.stage <= 1 or lazy) and not cached)
        network = self.network(self._micro(scans), keep)
        loss = loss_pass(self.recipe, scans, self.ranks)
        # The block that all ranks receive, its rows without padding, and the embeddings cut out of them.
        gathered = 3.0 * self.ranks * scans * sum(record_bytes(self.recipe)) if self.ranks > 1 else 0.0
        bucket = min(self.bucket, whole)
        taken = bucket if lazy and self.stage in (1, 2) else 0.0
        own = whole / self.ranks if self.stage else whole
        own_float32 = 4.0 * self.parameters / (self.ranks if self.stage else 1)
        accumulated = {0: whole, 1: whole, 2: own + taken, 3: 0.0}[self.stage] if cached else 0.0
        reduced = {0: whole, 1: own + max(0.0, whole - bucket), 2: own, 3: bucket}[self.stage]
        return {
            "loss": {"activations": 0.0 if cached else network.saved, "gathered features": gathered, "loss": loss.peak},
            "backward": {"activations": network.saved, "backward pass": network.peak - network.saved,
                         "gradients": accumulated},
            "reduction": {"gradients": reduced, "reduction": taken + (bucket if self.ranks > 1 or self.stage else 0.0)},
            "step": {"gradients": own_float32 + (own if self.stage else 0.0),
                     "optimizer's step": STEP_TENSORS * own_float32 if self.stage else 0.0},
        }  # fmt: skip

    def largest_batch(self, room: float) -> int:
        """Return the most scans of a rank whose memory is at most ``room`` bytes: 0 if not even one fits."""
        fitting, failing = 0, 1
        while failing <= LARGEST_SEARCHED and self.of_batch(failing).total <= room:
            fitting, failing = failing, 2 * failing
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            fitting, failing = (middle, failing) if self.of_batch(middle).total <= room else (fitting, middle)
        return fitting
