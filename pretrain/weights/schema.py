"""What the JSON files of an encoder may hold: config, preprocessing, readouts. They are checked before anything is built."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.volume.limits import MAX_SIDE, MAX_VOXELS, affine_fault, is_too_large
from data_pipeline.volume.preparation import CROPS, SCALINGS
from infra.errors import UserError
from pretrain.encoders import check_encoder

Text = Annotated[str, Field(max_length=4096)]
Share = Annotated[float, Field(ge=-1, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Rule = Literal["refuse", "zero", "resample", "keep"]


class _Part(BaseModel):
    """An object of JSON: types are not converted, and unknown keys are kept, since later versions may add some."""

    model_config = ConfigDict(strict=True, extra="allow")


def _allowed(words: tuple[str, ...]) -> Any:
    def check(value: str) -> str:
        if value not in words:
            raise ValueError(f"allowed: {', '.join(words)}")
        return value

    return Annotated[str, AfterValidator(check)]


def _as_base64(value: str) -> str:
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("allowed: float16 numbers in base64") from None
    if len(content) % 2 or not content:
        raise ValueError("allowed: float16 numbers in base64")
    numbers = np.frombuffer(content, "<f2").astype(np.float64)
    if not np.isfinite(numbers).all() or numbers.min() == numbers.max():
        raise ValueError("allowed: float16 numbers in base64, finite and not all equal")
    return value


class _Network(_Part):
    name: Text
    options: dict[str, Any] = Field(max_length=64)


class ConfigFile(_Part):
    """config.json: the network, and where its weights come from."""

    encoder: _Network
    feature_size: int = Field(ge=1, le=2**20)
    step: int = Field(ge=0)
    run_name: Text
    method: Text
    split: list[Text] = Field(max_length=1000)
    manifest_digest: Text | None = None
    run_id: Text | None = None
    version: Text | None = None
    experiment: Text | None = None
    simulated: bool = False
    epoch: int | None = None
    # Data set of the training -> its licences; older files have none, and neither has an imported encoder.
    licences: dict[Text, Annotated[list[Text], Field(max_length=100)]] | None = Field(default=None, max_length=1000)


def _is_read(shape: list[int]) -> list[int]:
    if is_too_large(shape):
        raise ValueError(f"more than {MAX_VOXELS} voxels")
    return shape


Sides = Annotated[
    list[Annotated[int, Field(ge=1, le=MAX_SIDE)]], Field(min_length=3, max_length=3), AfterValidator(_is_read)
]


class _Grid(_Part):
    shape: Sides
    spacing: list[Annotated[Number, Field(gt=0)]] = Field(min_length=3, max_length=3)
    affine: list[Annotated[list[Number], Field(min_length=4, max_length=4)]] = Field(min_length=4, max_length=4)

    @model_validator(mode="after")
    def _fit(self) -> _Grid:
        if fault := affine_fault(self.affine, self.spacing):
            raise ValueError(f"affine is not {fault}")
        return self


class _Likeness(_Part):
    volume: Annotated[str, Field(max_length=2**24), AfterValidator(_as_base64)]
    scans: int = Field(ge=1)
    median: Share
    lowest: Share
    means: list[Annotated[float, Field(allow_inf_nan=False, ge=0)]] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _in_order(self) -> _Likeness:
        if self.lowest > self.median or self.means[0] > self.means[1]:
            raise ValueError("allowed: lowest of at most median, and means in ascending order")
        return self


class _Arrays(_Part):
    orientations: dict[Text, Annotated[str, Field(pattern=r"^([RLAPSI]{3})?$")]] = Field(default={}, max_length=1000)
    on_grid: bool = False


class _Preparation(_Part):
    recipe: dict[Text, Any] = Field(max_length=100)
    libraries: dict[Text, Text] = Field(max_length=100)
    figures: dict[Text, Annotated[list[Finite], Field(min_length=2, max_length=2)]] = Field(max_length=100)

    @model_validator(mode="after")
    def _stated(self) -> _Preparation:
        texts, numbers = (self.recipe.get("pipeline"),), (self.recipe.get("version"), self.recipe.get("spacing"))
        if not all(isinstance(text, str) for text in texts) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError("allowed: a recipe with pipeline, version and spacing")
        if any(low > high for low, high in self.figures.values()):
            raise ValueError("allowed: the lowest value of each figure, then the highest")
        return self


class PreprocessingFile(_Part):
    """preprocessing.json: what happens to a scan between its file and the network."""

    grid: _Grid
    normalisation: Literal["zscore"] = "zscore"
    modality: Text | None = None
    scaling: _allowed(SCALINGS) | None = None  # type: ignore[valid-type]
    crop: _allowed(CROPS) | None = None  # type: ignore[valid-type]
    intensity: Literal["none", "robust"] | None = None
    nonfinite: Rule | None = None
    rules: dict[Literal["nonfinite", "constant", "grid"], Rule] | None = None
    arrays: _Arrays | None = None
    likeness: _Likeness | None = None
    preparation: _Preparation | None = None


class _CalibratedOn(_Part):
    split: Text | None
    people: int = Field(ge=1)
    scans: int = Field(ge=1)
    excluded: int = Field(ge=0)
    seen: bool | None
    reason: Text


class _Summary(_Part):
    scale: Literal["each", "all"]
    penalty: Annotated[float, Field(allow_inf_nan=False, gt=0)]
    people: int = Field(ge=1)
    scans: int = Field(ge=1)
    missing: int = Field(ge=0)
    unreadable: int = Field(ge=0)
    mae: Finite
    r2: Finite
    slope: Finite | None = None
    offset: Finite | None = None
    calibrated_on: _CalibratedOn | None = None  # older files have none: out of fold


class _ErrorRow(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")
    by: Literal["all", "age", "site"]
    group: Text
    people: int = Field(ge=1)
    scans: int = Field(ge=1)
    mae: Finite
    bias: Finite


class _Readout(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=256)]
    classes: list[Text] = Field(max_length=2)
    intercept: Finite
    summary: _Summary
    errors: list[_ErrorRow] = Field(max_length=100_000)

    @model_validator(mode="after")
    def _numbers_have_a_line(self) -> _Readout:
        if len(self.classes) != 2 and (self.classes or self.summary.slope is None or self.summary.offset is None):
            raise ValueError("allowed: two classes, or none with a slope and an offset")
        return self


class _Seen(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")
    manifest_digest: Text
    role: Text
    participants: list[Text]
    voxels: list[Text] | None = None


class ReadoutsFile(_Part):
    """readouts.json: what the numbers of readouts.safetensors are."""

    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    layer: Text | None
    pooling: list[Text] = Field(min_length=1, max_length=16)
    readouts: list[_Readout] = Field(max_length=64)
    left_out: dict[Text, Text] = Field(max_length=1000)
    fitted_on: list[_Seen] = Field(max_length=1000)

    @model_validator(mode="after")
    def _names_differ(self) -> ReadoutsFile:
        if len({readout.name for readout in self.readouts}) < len(self.readouts):
            raise ValueError("allowed: one readout of each name")
        return self


def check_config(content: dict[str, Any], path: Path) -> None:
    """Check config.json and the network's options in it. Raises UserError, naming the key, if one is wrong."""
    _check(ConfigFile, content, path)
    try:
        check_encoder(content["encoder"]["name"], content["encoder"]["options"])
    except UserError as error:
        raise UserError(f"{path}: {_line(str(error), 400)}") from None


def check_preprocessing_file(content: dict[str, Any], path: Path) -> None:
    """Check the content of preprocessing.json. Raises UserError, naming the key, if one is wrong."""
    _check(PreprocessingFile, content, path)


def check_readouts_file(content: dict[str, Any], path: Path) -> None:
    """Check the content of readouts.json. Raises UserError, naming the key, if one is wrong."""
    _check(ReadoutsFile, content, path)


def _check(model: type[BaseModel], content: dict[str, Any], path: Path) -> None:
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = _line(".".join(map(str, first["loc"])), 80)
        found = "" if first["type"] == "missing" else f"={repr(first['input'])[:60]}"
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise UserError(f"{path}: {key}{found}: {first['msg']}{more}; export the encoder again") from None


def _line(text: str, most: int) -> str:
    """Return the first letters of a text that may hold names of the file; letters that cannot be printed become ?."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])
