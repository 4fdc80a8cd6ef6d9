"""A recipe: one YAML file of sections, overridden by ``--section.key=value``, checked into dataclasses.

OmegaConf reads and merges (it knows that ``1e-4`` is a number, and interpolates ``${...}``); pydantic checks types and
bounds. Keys that no dataclass has fail and name the nearest one, so that a typing error never trains a different model.
"""

from __future__ import annotations

import dataclasses
import keyword
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from infra.errors import UserError, nearest

Settings = TypeVar("Settings")


def load_settings(cls: type[Settings], recipe: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read ``recipe`` (YAML), apply ``--section.key=value`` overrides and check the result against ``cls``.

    Raises UserError with the key, the value found, what is allowed and where it came from.
    """
    tree = _read(recipe) if recipe else OmegaConf.create({})
    source = recipe.name if recipe else "settings"
    _refuse_unknown(cls, _plain(tree, source), source)
    for override in overrides:
        tree = _override(cls, tree, override)
    plain = _escape(_plain(tree, source))
    try:
        return TypeAdapter(cls).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part).removesuffix("_") for part in first["loc"]) or "(top)"
        wrong = first["input"]
        found = "" if isinstance(wrong, Mapping) and first["type"] == "missing" else f", found {wrong!r}"
        raise UserError(f"{source}: {key}: {first['msg']}{found}; set it in the recipe or with --{key}=VALUE") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as plain nested dictionaries, in the order in which the dataclass lists them."""
    plain: dict[str, Any] = _unescape(TypeAdapter(type(settings)).dump_python(settings, mode="json"))
    return plain


def to_yaml(settings: Any) -> str:
    """Settings as YAML that ``load_settings`` reads back to the same settings."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(settings)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"loss": {"bandwidth": 5}}`` -> ``{"loss.bandwidth": 5}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(recipe: Path) -> Any:
    try:
        tree = OmegaConf.load(recipe)
    except FileNotFoundError:
        raise UserError(f"recipe {recipe} not found; give a shipped recipe's name or the path of a YAML file") from None
    except Exception as error:  # the parser raises many kinds; each means that the file is not YAML
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(tree):
        raise UserError(f"recipe {recipe} must hold sections of keys, found {type(tree).__name__}")
    return tree


def _override(cls: type[Any], tree: Any, override: str) -> Any:
    name, equals, _ = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals:
        raise UserError(f"override {override!r} is not of the form --section.key=value")
    try:
        given = OmegaConf.from_dotlist([override[2:]])
    except Exception as error:  # the YAML parser's own kinds
        raise UserError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    _refuse_unknown(cls, _plain(given, f"--{name}"), f"--{name}")
    # A value replaces what the recipe holds under its key whole; merging would keep the list items it means to drop.
    OmegaConf.update(tree, name, OmegaConf.select(given, name), merge=False, force_add=True)
    return tree


def _plain(tree: Any, source: str) -> dict[str, Any]:
    try:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def _refuse_unknown(cls: type[Any], tree: Mapping[str, Any], source: str, prefix: str = "") -> None:
    hints = {name.removesuffix("_"): hint for name, hint in typing.get_type_hints(cls).items()}
    for key, value in tree.items():
        if key not in hints:
            known = ", ".join(f.name.removesuffix("_") for f in dataclasses.fields(cls))
            full = f"{prefix}{key}"
            raise UserError(f"{source}: unknown key {full!r}{nearest(str(key), hints)}; allowed here: {known}")
        hint = hints[key]
        if typing.get_origin(hint) is dict and isinstance(value, Mapping):
            named = [
                (f"{prefix}{key}.{name}.", _section(typing.get_args(hint)[1]), part) for name, part in value.items()
            ]
        else:
            named = [(f"{prefix}{key}.", _section(hint), value)]
        for path, section, part in named:
            if section is not None and isinstance(part, Mapping):
                _refuse_unknown(section, part, source, path)


def _escape(tree: Any) -> Any:
    """A key that is a word of Python (``global``) belongs to the field of that name with an underscore behind it."""
    if isinstance(tree, Mapping):
        return {f"{key}_" if keyword.iskeyword(str(key)) else key: _escape(value) for key, value in tree.items()}
    return tree


def _unescape(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key[:-1] if keyword.iskeyword(str(key)[:-1]) else key: _unescape(value) for key, value in tree.items()}
    return tree


def _section(annotation: Any) -> type[Any] | None:
    """The dataclass that an annotation names (``Loss`` or ``Loss | None``), if it names one."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    candidates = typing.get_args(annotation) if union else [annotation]
    for candidate in candidates:
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None
