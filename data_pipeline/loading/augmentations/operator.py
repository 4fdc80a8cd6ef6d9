"""What an augmentation operator consists of.

An ``Operator`` has settings (a section of a recipe), random numbers of its own, a function that draws a view's parameters
from them, and a ``Step`` of the DALI graph. The step turns the parameters into arrays in the reader process and applies them
in the graph. Several operators may name the same step, which then applies them together: flip, affine and crop are one
resampling.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid")
Probability = Field(default=0.0, ge=0.0, le=1.0)


class ViewContext(NamedTuple):
    """What an operator may know of a view before it is augmented: the grid's shape (D, H, W) and the run's seed."""

    shape: tuple[int, int, int]
    seed: int


class GraphContext(NamedTuple):
    """What all views of a DALI graph share.

    Attributes:
        shape: (D, H, W).
        low: the scan's minimum after the z-score, a DALI node; None unless a step sets ``uses_range``.
        span: the scan's maximum minus its minimum, likewise.
        gpu: whether the graph runs on a GPU. Arrays of a volume's size then need ``.gpu()``.
        pool: threads for work on the CPU that DALI does not do itself; None runs it in the calling one.
    """

    shape: list[float]
    low: Any
    span: Any
    gpu: bool
    pool: Executor | None = None


@dataclass(frozen=True)
class Step:
    """One step of the DALI graph.

    Attributes:
        arrays: ``arrays(context, *parameters)`` returns a view's NumPy arrays for this step. ``parameters`` holds what each
            of the step's operators drew, in the order of the table, None for an operator that is not applied to this view.
        kinds: DALI type and number of dimensions of each of these arrays, as in ``(("FLOAT", 1),)``.
        apply: ``apply(view, arrays, context)`` builds the DALI nodes that change ``view``, a (D, H, W, 1) float32 volume.
            It imports nvidia.dali itself. The graph runs it only for the views to which one of its operators is applied.
        always: run the step for every view; ``arrays`` must then hold values that change nothing where nothing is applied.
        uses_range: the step reads ``GraphContext.low`` and ``span``.
        volumes: how many arrays have the volume's size as float16; memory is reserved for them.
    """

    arrays: Callable[..., list[NDArray[Any]]]
    kinds: tuple[tuple[str, int], ...]
    apply: Callable[..., Any]
    always: bool = False
    uses_range: bool = False
    volumes: int = 0


@dataclass(frozen=True)
class Operator:
    """One augmentation.

    Attributes:
        settings: pydantic dataclass of its recipe keys. It has a field ``p``, the probability of the operator for each view,
            and its defaults never apply it.
        numbers: which of a view's uniform random numbers are its own. The first decides whether it is applied. An operator's
            numbers never change, since they decide the views of every run; a new one takes numbers after all others.
        draw: ``draw(settings, u, shape)`` returns a view's parameters from the remaining numbers ``u`` in [0, 1) and the
            volume's shape (D, H, W); None if they change nothing.
        step: the step of the graph that applies it.
    """

    settings: type[Any]
    numbers: range
    draw: Callable[[Any, NDArray[np.float64], tuple[int, ...]], Any]
    step: Step


def between(limits: tuple[float, float], u: float) -> float:
    """Map ``u`` in [0, 1) to the interval ``limits``."""
    return limits[0] + (limits[1] - limits[0]) * u
