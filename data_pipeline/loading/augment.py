"""Augmentation: the table of operators, the presets, and the parameters of a view.

Everything that varies is drawn from a counter-based generator keyed by (seed, epoch, scan, view), so a view is the same on
any rank, in any order and after any resume. Axes (D, H, W) are (left-right, back-front, down-up) of a RAS volume.
``data_pipeline.loading.dali_graph`` applies the parameters.

A new augmentation is one file in ``data_pipeline/loading/augmentations`` and one line in ``AUGMENTATIONS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from data_pipeline.loading.augmentations.bias import BIAS, Bias
from data_pipeline.loading.augmentations.blur import BLUR, Blur
from data_pipeline.loading.augmentations.cutout import CUTOUT, Cutout
from data_pipeline.loading.augmentations.gamma import GAMMA, Gamma
from data_pipeline.loading.augmentations.noise import NOISE, Noise
from data_pipeline.loading.augmentations.operator import Operator, Step, ViewContext
from data_pipeline.loading.augmentations.warp import AFFINE, CROP, FLIP, Affine, Crop, Flip
from infra.errors import UserError, nearest
from infra.random_streams import AUGMENTATION, generator

AUGMENTATIONS: dict[str, Operator] = {
    "crop": CROP,
    "affine": AFFINE,
    "flip": FLIP,
    "blur": BLUR,
    "gamma": GAMMA,
    "bias": BIAS,
    "noise": NOISE,
    "cutout": CUTOUT,
}
"""Recipe key -> operator, in the order of application. Crop, affine and flip share a step: one resampling applies them."""


class Augmentation:
    """The settings of every operator, as in ``Augmentation(flip=Flip(p=0.5), blur=Blur(p=0.2))``.

    Each operator is drawn for each view with its own probability ``p``. An operator that is not named is never applied. The
    z-score comes first; then the operators follow in the order of ``AUGMENTATIONS``. ``augmentation["blur"]`` returns the
    settings of an operator.
    """

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name not in AUGMENTATIONS:
                raise UserError(_unknown(name))
        check_numbers(AUGMENTATIONS)
        # The operators are kept here: a reader process then draws as this process, also after a change of the table.
        self._operators = dict(AUGMENTATIONS)
        self._settings = {name: settings.get(name) or op.settings() for name, op in self._operators.items()}

    def __getitem__(self, name: str) -> Any:
        return self._settings[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Augmentation) and self._settings == other._settings

    def __hash__(self) -> int:
        return hash(tuple(self._settings.items()))

    def without(self, name: str) -> Augmentation:
        """Return these settings with one operator left out; what the others draw stays the same."""
        return Augmentation(**{kept: self._settings[kept] for kept in self.operators if kept != name})

    def __repr__(self) -> str:
        used = ", ".join(f"{name}={self._settings[name]}" for name in self.operators)
        return f"Augmentation({used})"

    @property
    def operators(self) -> dict[str, Operator]:
        """The operators that are ever applied, by name, in the order of application."""
        return {name: operator for name, operator in self._operators.items() if self._settings[name].p > 0}

    @property
    def steps(self) -> dict[Step, list[str]]:
        """The steps that the graph must hold, in the order of application, each with the names of all its operators."""
        names: dict[Step, list[str]] = {operator.step: [] for operator in self.operators.values()}
        for name, operator in self._operators.items():
            if operator.step in names:
                names[operator.step].append(name)
        return names


def check_numbers(table: Mapping[str, Operator]) -> None:
    """Raise ValueError if two operators of a table use the same random number; the message names a free one."""
    owner: dict[int, str] = {}
    for name, operator in table.items():
        for number in operator.numbers:
            if number in owner:
                free = max(op.numbers.stop for op in table.values())
                raise ValueError(
                    f"augmentations {owner[number]} and {name} both draw number {number}; give the newer one numbers "
                    f"from {free} on"
                )
            owner[number] = name


PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # Dufumier et al. 2021 (https://arxiv.org/abs/2106.08808): each with probability one half, drawn for each view.
    "paper-all": Augmentation(
        flip=Flip(p=0.5), blur=Blur(p=0.5), noise=Noise(p=0.5), cutout=Cutout(p=0.5), crop=Crop(p=0.5)
    ),
    # The augmentation of the published weights.
    "paper-cutout": Augmentation(cutout=Cutout(p=1.0)),
    # The paper's with milder noise, and in half of the views a small affine motion in place of the harsh crop.
    "default": Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=8.0, zoom=0.05, shift=0.04), crop=Crop(p=0.25, side=0.85),
        blur=Blur(p=0.5), noise=Noise(p=0.5, sigma=(0.05, 0.5)), cutout=Cutout(p=0.5),
    ),
    # For raw or quasi-raw T1 images, whose contrast and bias field differ between scanners; VBM maps have neither.
    "t1w": Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=8.0, zoom=0.05, shift=0.04), crop=Crop(p=0.25, side=0.85),
        blur=Blur(p=0.5), noise=Noise(p=0.5, sigma=(0.05, 0.5)), cutout=Cutout(p=0.5), gamma=Gamma(p=0.5), bias=Bias(p=0.5),
    ),
}  # fmt: skip


def load_augmentation(section: Mapping[str, Any] | str) -> Augmentation:
    """Read a recipe's ``augmentation:`` section.

    Args:
        section: a preset's name, or a mapping with ``preset`` (default ``none``) and keys of operators that change it, as in
            ``{"preset": "default", "blur": {"p": 0.2}}``.

    Raises:
        UserError: if a preset, operator, key or value is invalid.
    """
    keys = {"preset": section} if isinstance(section, str) else dict(section)
    preset = keys.pop("preset", "none")
    if preset not in PRESETS:
        raise UserError(
            f"augmentation.preset={preset!r} is not known{nearest(str(preset), PRESETS)}; {_allowed(PRESETS)}"
        )
    base = PRESETS[preset]
    settings = {name: base[name] for name in base.operators}
    for name, values in keys.items():
        settings[name] = _changed_settings(name, values, settings.get(name))
    return Augmentation(**settings)


def _changed_settings(name: str, values: Any, base: Any) -> Any:
    """Return an operator's settings with the recipe's ``values`` in place of those of ``base`` (None: its defaults)."""
    if name not in AUGMENTATIONS:
        raise UserError(_unknown(name))
    if not isinstance(values, Mapping):
        raise UserError(f"augmentation.{name}={values!r} must hold keys such as p: 0.5")
    kind = AUGMENTATIONS[name].settings
    adapter = TypeAdapter(kind)
    plain = adapter.dump_python(base or kind())
    for key in values:
        if key not in plain:
            raise UserError(f"augmentation.{name}.{key} is not known{nearest(key, plain)}; {_allowed(plain)}")
    try:
        return adapter.validate_python({**plain, **values})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(level) for level in (name, *first["loc"]))
        raise UserError(f"augmentation.{key}: {first['msg']}, found {first['input']!r}") from None


@dataclass(frozen=True)
class View:
    """What was drawn for one view: each operator's parameters, None where it is not applied."""

    parameters: dict[str, Any]

    def __getitem__(self, operator: str) -> Any:
        return self.parameters.get(operator)


def draw_view(
    augmentation: Augmentation, shape: tuple[int, ...], *, seed: int, epoch: int, scan: int, view: int
) -> View:
    """Draw one view's parameters.

    Args:
        augmentation: the operators' settings.
        shape: (D, H, W) of the volume.
        seed: the run's seed.
        epoch: how often the scan was shown before.
        scan: row number of the scan.
        view: 0 or 1.

    Every operator has fixed numbers of the stream, whether or not it is applied, so changing or adding one leaves what
    the others draw as it was.
    """
    operators = augmentation.operators
    count = max((operator.numbers.stop for operator in operators.values()), default=0)
    u = generator(seed, AUGMENTATION, (0, epoch, scan, view)).random(count)
    parameters = {}
    for name, operator in operators.items():
        own = u[operator.numbers.start : operator.numbers.stop]
        settings = augmentation[name]
        parameters[name] = operator.draw(settings, own[1:], shape) if own[0] < settings.p else None
    return View(parameters)


def view_arrays(augmentation: Augmentation, view: View, context: ViewContext) -> list[NDArray[Any]]:
    """Return one view's arrays for the graph; ``array_kinds`` has their types and numbers of dimensions.

    The first is ``flags`` (steps that are not applied to every view,), int32, 1 if the step is applied to this view; it is
    left out if there are no such steps. The arrays of each step follow in the order of application; their shapes are
    described at the step.
    """
    flags: list[int] = []
    arrays: list[NDArray[Any]] = []
    for step, names in augmentation.steps.items():
        parameters = [view[name] for name in names]
        if not step.always:
            flags.append(int(any(drawn is not None for drawn in parameters)))
        arrays += step.arrays(context, *parameters)
    return [np.array(flags, np.int32), *arrays] if flags else arrays


def array_kinds(augmentation: Augmentation) -> list[tuple[str, int]]:
    """Return DALI type and number of dimensions of each array of ``view_arrays``."""
    kinds = [kind for step in augmentation.steps for kind in step.kinds]
    return [("INT32", 1), *kinds] if any(not step.always for step in augmentation.steps) else kinds


def _unknown(name: str) -> str:
    return f"augmentation.{name} is not an operator{nearest(name, AUGMENTATIONS)}; {_allowed(AUGMENTATIONS)}"


def _allowed(names: Any) -> str:
    return f"allowed: {', '.join(names)}"
