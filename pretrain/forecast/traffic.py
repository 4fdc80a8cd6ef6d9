"""The collectives of a training step, and the bytes that a rank sends in them.

With W ranks and a whole vector of n bytes, a rank sends over a ring

    all_reduce          2 (W - 1) / W n
    all_gather            (W - 1) / W n         n: what every rank has afterwards
    reduce_scatter        (W - 1) / W n         gloo: as all_reduce, by which it implements it
    all_to_all            (W - 1) / W n

What DeepSpeed 0.19 exchanges in a step, with N parameters of e bytes and p passes (GradCache's micro-batches):

    stage 0     all_reduce of N e
    stage 1     all_reduce of N e, all_gather of the weights N e
    stage 2     all_reduce of N e in each of p passes, all_gather of the weights N e
    stage 3     all_gather of N e and reduce_scatter of N e; with GradCache 3 all_gathers in each of p passes (first pass,
                second pass, backward pass) and a reduce_scatter

Stages 1 and 2 reduce whole gradients by an all_reduce (``use_multi_rank_bucket_allreduce``, DeepSpeed's default), so that they
send half as much again as stage 0, not the same. Stage 3 keeps gathered weights until their backward pass as long as
``stage3_max_live_parameters`` and ``stage3_max_reuse_distance`` (10^9 both) allow; beyond, it gathers them twice. It foresees
this only if every step is a forward pass and a backward pass, so not with GradCache. Small parameters are gathered less often.

The loss gathers one record per scan and sends its gradient back (`pretrain.losses.gather`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.config import Recipe
from pretrain.engine.deepspeed_config import zero_stage
from pretrain.losses.proxies import proxy_columns

# Operation -> factor on (W - 1) / W n.
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
GLOO = {**RING, "reduce_scatter": 2}
FACTORS: Mapping[str, Mapping[str, int]] = {"nccl": RING, "gloo": GLOO}
MAX_LIVE = 10**9


@dataclass(frozen=True)
class Collective:
    """One exchange of a step.

    Attributes:
        of: what is exchanged: ``embeddings``, ``gradients`` or ``weights``.
        operation: a key of RING.
        size: bytes of the whole vector.
        times: how often per step.
    """

    of: str
    operation: str
    size: float
    times: int = 1

    def sent(self, ranks: int, backend: str) -> float:
        """Return the bytes that a rank sends in a step, with backend "nccl" or "gloo"."""
        return self.times * FACTORS[backend][self.operation] * (ranks - 1) / ranks * self.size

    def messages(self, ranks: int) -> int:
        """Return the messages that wait for each other in a step: those of a tree, which NCCL takes for short vectors.

        In a ring, ``ranks - 1`` messages would wait for each other.
        """
        return self.times * RING[self.operation] * math.ceil(math.log2(ranks))


def width_of(recipe: Recipe) -> int:
    """Return the bytes of a weight and of its gradient."""
    return 2 if recipe.train.precision in ("bf16", "fp16") else 4


def record_bytes(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of a scan's two embeddings, float32, and of its proxies, participant and site, in the loss's gathers.

    A share of the loss within sites gathers everything once more, with the sites.
    """
    section = recipe.loss
    codes = 8 * section.mask_subjects + 4 * section.subject_positives
    gathers, sites = (2 if 0 < section.site_negatives < 1 else 1), 8 * (section.site_negatives > 0)
    one = 4 * len(proxy_columns(section.proxies)) + codes
    return gathers * 2 * recipe.projector.out * 4, gathers * one + sites


def collectives_of_step(recipe: Recipe, parameters: int, scans: int, ranks: int, backend: str) -> list[Collective]:
    """Return the exchanges of a step of ``scans`` scans on each of ``ranks`` ranks; none for a single rank.

    Further terms of the loss, metrics and votes, which are small, are left out.
    """
    if ranks == 1:
        return []
    passes = -(-scans // (recipe.batch.micro or scans))
    stage, whole = zero_stage(recipe), float(width_of(recipe) * parameters)
    embeddings, metadata = record_bytes(recipe)
    total = scans * ranks
    back = "all_to_all" if backend == "gloo" else "reduce_scatter"
    exchanges = [
        Collective("embeddings", "all_gather", total * (embeddings + metadata) + 8 * ranks),
        Collective("embeddings", back, total * embeddings),
    ]
    if stage == 3:
        gathers = 3 * passes if passes > 1 else 2 if parameters > MAX_LIVE else 1
        exchanges.append(Collective("weights", "all_gather", whole, gathers))
        exchanges.append(Collective("gradients", "reduce_scatter", whole, passes))
        return exchanges
    exchanges.append(Collective("gradients", "all_reduce", whole, passes if stage == 2 else 1))
    if stage:
        exchanges.append(Collective("weights", "all_gather", whole))
    return exchanges


def sent_bytes(exchanges: list[Collective], ranks: int, backend: str) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by what is exchanged."""
    sent: dict[str, float] = {}
    for exchange in exchanges:
        sent[exchange.of] = sent.get(exchange.of, 0.0) + exchange.sent(ranks, backend)
    return sent
