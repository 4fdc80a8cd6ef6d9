"""What happens to a view: settings, and the drawing of one view's parameters. Applying them is
data_pipeline.loading.dali_graph.

Everything that varies is drawn from a counter-based generator keyed by (seed, epoch, scan, view), so that a view is the
same on any rank, in any order, after any resume. Axes (D, H, W) = (left-right, back-front, down-up) of a RAS volume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from infra.errors import UserError, nearest
from infra.random_streams import AUGMENTATION, NOISE_BANK, generator

Array = np.ndarray[Any, np.dtype[np.float32]]
BANK_MARGIN = 64  # voxels by which the bank of noise is longer than a volume, along each axis
_strict = ConfigDict(extra="forbid")
Probability = Field(default=0.0, ge=0.0, le=1.0)


@dataclass(frozen=True, config=_strict)
class Flip:
    """Left and right change places."""

    p: float = Probability


@dataclass(frozen=True, config=_strict)
class Affine:
    """Rotation about each axis, one zoom for all axes, and a shift along each: uniform in ± the given amount."""

    p: float = Probability
    degrees: float = Field(default=0.0, ge=0.0, le=180.0)
    zoom: float = Field(default=0.0, ge=0.0, lt=1.0)
    shift: float = Field(default=0.0, ge=0.0, le=0.5)  # share of a side


@dataclass(frozen=True, config=_strict)
class Crop:
    """A box of ``side`` of each side at a random place, brought back to the full grid."""

    p: float = Probability
    side: float = Field(default=0.75, gt=0.0, le=1.0)


@dataclass(frozen=True, config=_strict)
class Blur:
    """Gaussian blur, standard deviation in voxels uniform in ``sigma``."""

    p: float = Probability
    sigma: tuple[float, float] = (0.1, 1.0)


@dataclass(frozen=True, config=_strict)
class Gamma:
    """Contrast: the intensities, brought to 0..1 by the scan's own minimum and maximum, to a power, and back.

    A power needs numbers from 0 up, which a z-scored scan has not: 0..1 is where a raw scan's air and brightest voxel lie.
    Range and order of the intensities stay. log(power) is uniform in ± ``log``.
    """

    p: float = Probability
    log: float = Field(default=0.3, ge=0.0, le=2.0)


@dataclass(frozen=True, config=_strict)
class Bias:
    """Bias field of the coil: intensities above the scan's minimum times a smooth field between exp(± ``strength``).

    The logarithm of the field is a sum over the axes of a half and a whole cosine wave, of drawn phases and amplitudes.
    """

    p: float = Probability
    strength: float = Field(default=0.4, ge=0.0, le=2.0)


@dataclass(frozen=True, config=_strict)
class Noise:
    """Gaussian noise on the z-scored volume, standard deviation uniform in ``sigma``."""

    p: float = Probability
    sigma: tuple[float, float] = (0.1, 1.0)


@dataclass(frozen=True, config=_strict)
class Cutout:
    """A box of ``side`` of each side, at a random place, set to 0."""

    p: float = Probability
    side: float = Field(default=0.25, gt=0.0, lt=1.0)


@dataclass(frozen=True, config=_strict)
class Augmentation:
    """Each operator is drawn for each view by its own probability ``p``.

    Order: z-score (always), flip + affine + crop as one resampling, blur, gamma, bias, noise, cutout.
    """

    flip: Flip = field(default_factory=Flip)
    affine: Affine = field(default_factory=Affine)
    crop: Crop = field(default_factory=Crop)
    blur: Blur = field(default_factory=Blur)
    noise: Noise = field(default_factory=Noise)
    cutout: Cutout = field(default_factory=Cutout)
    gamma: Gamma = field(default_factory=Gamma)
    bias: Bias = field(default_factory=Bias)

    @property
    def warps(self) -> bool:
        """Whether any view is ever resampled: flip, affine and crop are one fused warp."""
        return max(self.flip.p, self.affine.p, self.crop.p) > 0

    @property
    def operators(self) -> tuple[str, ...]:
        """What the graph must hold, in the order of application; what never happens is left out."""
        return tuple(name for name in ORDER if (self.warps if name == "warp" else getattr(self, name).p > 0))

    @property
    def flagged(self) -> bool:
        """Whether views differ in which operators the graph runs for them (cutout runs for every view)."""
        return any(name != "cutout" for name in self.operators)


ORDER = ("warp", "blur", "gamma", "bias", "noise", "cutout")

PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # Dufumier et al. 2021: each with probability one half, drawn for each view.
    "paper-all": Augmentation(
        flip=Flip(p=0.5), blur=Blur(p=0.5), noise=Noise(p=0.5), cutout=Cutout(p=0.5), crop=Crop(p=0.5)
    ),
    # What the published weights were trained with.
    "paper-cutout": Augmentation(cutout=Cutout(p=1.0)),
    # The paper's, milder noise, and small rigid motion in place of the harsh crop half of the time.
    "default": Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=8.0, zoom=0.05, shift=0.04), crop=Crop(p=0.25, side=0.85),
        blur=Blur(p=0.5), noise=Noise(p=0.5, sigma=(0.05, 0.5)), cutout=Cutout(p=0.5),
    ),
    # Raw or quasi-raw T1: contrast and coil differ between scanners, which modulated grey matter knows nothing of.
    "t1w": Augmentation(
        flip=Flip(p=0.5), affine=Affine(p=0.5, degrees=8.0, zoom=0.05, shift=0.04), crop=Crop(p=0.25, side=0.85),
        blur=Blur(p=0.5), noise=Noise(p=0.5, sigma=(0.05, 0.5)), cutout=Cutout(p=0.5), gamma=Gamma(p=0.5), bias=Bias(p=0.5),
    ),
}  # fmt: skip


def load_augmentation(section: Mapping[str, Any] | str) -> Augmentation:
    """A recipe's ``augmentation:`` section: ``preset`` and, on top of it, any operator's own keys."""
    given = {"preset": section} if isinstance(section, str) else dict(section)
    preset = given.pop("preset", "none")
    if preset not in PRESETS:
        raise UserError(f"augmentation.preset={preset!r} is not known{nearest(str(preset), PRESETS)}; {_list(PRESETS)}")
    adapter = TypeAdapter(Augmentation)
    plain = adapter.dump_python(PRESETS[preset])
    for name, values in given.items():
        if name not in plain:
            raise UserError(f"augmentation.{name} is no operator{nearest(name, plain)}; {_list(plain)}")
        if not isinstance(values, Mapping):
            raise UserError(f"augmentation.{name}={values!r} must hold keys such as p: 0.5")
        for key in values:
            if key not in plain[name]:
                raise UserError(
                    f"augmentation.{name}.{key} is not known{nearest(key, plain[name])}; {_list(plain[name])}"
                )
        plain[name] = {**plain[name], **values}
    try:
        return adapter.validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"augmentation.{key}: {first['msg']}, found {first['input']!r}") from None


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class View:
    """One view's parameters. What is not applied has the value that changes nothing."""

    matrix: Any  # (3, 4) float32: output voxel -> input voxel, (D, H, W), origin at the volume's corner
    blur: float  # standard deviation in voxels
    noise: float  # standard deviation
    noise_from: tuple[int, int, int]  # corner in the bank
    noise_sign: float
    cutout_from: Any  # (3,) float32, share of each side
    cutout_side: float
    gamma: float  # power
    bias: Any  # three (n,) float32, one an axis: the field is their outer product

    @property
    def move(self) -> int:
        """How it is resampled: ``STILL``, ``MIRRORED``, along the axes alone (``BOX``), or ``TURNED``.

        Each takes a fraction of the time of the next: a copy, and at 121 x 145 x 121 on a CPU 14 and 200 ms.
        """
        linear, offset = self.matrix[:, :3], self.matrix[:, 3]
        if np.any(linear[~np.eye(3, dtype=bool)] != 0):
            return TURNED
        if np.any(np.abs(np.diag(linear)) != 1) or np.any(offset[1:] != 0) or np.any(np.diag(linear)[1:] != 1):
            return BOX
        start = 0 if linear[0, 0] > 0 else len(self.bias[0])
        return BOX if offset[0] != start else (STILL if start == 0 else MIRRORED)


STILL, MIRRORED, BOX, TURNED = range(4)
NO_BLUR = 1e-3  # DALI refuses 0; at a thousandth of a voxel every other weight of the kernel is exactly 0


def draw_view(settings: Augmentation, shape: tuple[int, ...], seed: int, epoch: int, scan: int, view: int) -> View:
    """Draw one view's parameters for a volume of ``shape`` (D, H, W).

    Every operator draws whether or not it is applied, so that changing one's probability leaves the others' draws alone.
    A new operator takes further numbers at the end, which leaves all older draws as they were.
    """
    u = generator(seed, AUGMENTATION, (0, epoch, scan, view)).random(39)
    blur = NO_BLUR if u[0] >= settings.blur.p else _between(settings.blur.sigma, u[1])
    noise = 0.0 if u[2] >= settings.noise.p else _between(settings.noise.sigma, u[3])
    corner = tuple(int(v) for v in u[4:7] * BANK_MARGIN)
    side = settings.cutout.side if u[8] < settings.cutout.p else 0.0
    cut_from = (u[9:12] * (1.0 - settings.cutout.side)).astype(np.float32)
    matrix = _matrix(settings, np.asarray(shape, dtype=np.float64), u[12:25])
    gamma = float(np.exp((2.0 * u[28] - 1.0) * settings.gamma.log)) if u[27] < settings.gamma.p else 1.0
    bias = _bias(settings.bias.strength if u[29] < settings.bias.p else 0.0, shape, u[30:39])
    sign = 1.0 if u[7] < 0.5 else -1.0
    return View(matrix, max(blur, NO_BLUR), noise, corner, sign, cut_from, side, gamma, bias)  # type: ignore[arg-type]


def _matrix(settings: Augmentation, shape: Any, u: Any) -> Array:
    """Output to input coordinates: flip, then affine about the centre, then crop, in one matrix."""
    linear, centre = np.eye(3), shape / 2.0
    offset = np.zeros(3)
    if u[0] < settings.crop.p:
        linear *= settings.crop.side
        offset += (u[1:4] - 0.5) * (1.0 - settings.crop.side) * shape
    if u[4] < settings.affine.p:
        angles = np.deg2rad((2.0 * u[5:8] - 1.0) * settings.affine.degrees)
        linear = _rotation(angles) @ linear * (1.0 + (2.0 * u[8] - 1.0) * settings.affine.zoom)
        offset += (2.0 * u[9:12] - 1.0) * settings.affine.shift * shape
    if u[12] < settings.flip.p:
        linear[:, 0] *= -1.0
    return np.concatenate([linear, (centre + offset - linear @ centre)[:, None]], axis=1).astype(np.float32)


def _rotation(angles: Any) -> Any:
    (sa, sb, sc), (ca, cb, cc) = np.sin(angles), np.cos(angles)
    about_d = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_h = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_w = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_w @ about_h @ about_d


def _bias(strength: float, shape: tuple[int, ...], u: Any) -> tuple[Array, ...]:
    """The field's factor along each axis; ``u`` (9,) holds a phase and two amplitudes for each."""
    factors = []
    for length, (phase, half, whole) in zip(shape, u.reshape(3, 3), strict=True):
        along = (np.arange(length) + 0.5) / length
        waves = sum((a - 0.5) * np.cos(np.pi * k * (along + 2.0 * phase)) for k, a in ((1, half), (2, whole)))
        # Two amplitudes of at most one half: the sum over three axes stays within ± strength.
        factors.append(np.exp(strength / 3.0 * waves).astype(np.float32))
    return tuple(factors)


def view_arrays(settings: Augmentation, view: View, noise: Any) -> list[Any]:
    """One view's numbers as the graph takes them: flags (5,) int32 if any is needed, then each operator's, in order.

    ``noise``: (D, H, W, 1) float16 cut from the bank, or None where the view has none.
    """
    applied = (view.blur > NO_BLUR, view.gamma != 1.0, any(np.any(f != 1) for f in view.bias), noise is not None)
    arrays: list[Any] = [np.array([view.move, *applied], np.int32)] if settings.flagged else []
    for operator in settings.operators:
        arrays += OPERATOR_ARRAYS[operator](view, noise)
    return arrays


def _warp_arrays(view: View, noise: Any) -> list[Any]:
    # DALI's warp counts axes as (x, y, z) = (W, H, D). A box is given by the corners that it maps the volume's to.
    matrix, (d, h, w) = view.matrix, (len(f) for f in view.bias)
    low = matrix[:, 3]
    high = matrix[:, :3].astype(np.float64) @ np.array([d, h, w], np.float64) + low
    dali = np.ascontiguousarray(matrix[::-1][:, [2, 1, 0, 3]])
    box = view.move == BOX
    return [dali, np.ascontiguousarray(low if box else low * 0), (high if box else np.ones(3)).astype(np.float32)]


def _bias_arrays(view: View, noise: Any) -> list[Any]:
    return [f.reshape(*(-1 if axis == own else 1 for axis in range(4))) for own, f in enumerate(view.bias)]


def _noise_arrays(view: View, noise: Any) -> list[Any]:
    nothing = np.zeros((1, 1, 1, 1), np.float16)  # a view without noise costs neither memory nor transport
    return [np.array(view.noise * view.noise_sign, np.float32), nothing if noise is None else noise]


OPERATOR_ARRAYS: dict[str, Callable[[View, Any], list[Any]]] = {
    "warp": _warp_arrays,
    "blur": lambda view, noise: [np.array([view.blur], np.float32)],
    "gamma": lambda view, noise: [np.array(view.gamma, np.float32)],
    "bias": _bias_arrays,
    "noise": _noise_arrays,
    "cutout": lambda view, noise: [view.cutout_from, np.full(3, view.cutout_side, np.float32)],
}


def noise_bank(shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Standard normal values from which every view's noise is cut, ``BANK_MARGIN`` longer than ``shape``.

    A crop at a drawn corner with a drawn sign is one of 2 x 64³ noises, uncorrelated voxel by voxel, for the price of a
    copy; and unlike DALI's own noise, whose state is one per batch, it is the same whichever rank the scan falls to.
    """
    size = [n + BANK_MARGIN for n in shape]
    return generator(seed, NOISE_BANK).standard_normal(size, dtype=np.float32).astype(np.float16)


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _list(names: Any) -> str:
    return f"allowed: {', '.join(names)}"
