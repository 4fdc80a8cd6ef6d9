"""Read settings from a YAML file and ``--section.key=value`` overrides, and validate them against dataclasses.

OmegaConf reads and merges them (it parses ``1e-4`` as a number and interpolates ``${...}``); pydantic checks types and
bounds. An unknown key raises an error that names the closest valid key, so that a typo never changes what is trained.
"""

from __future__ import annotations

import dataclasses
import keyword
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from infra.errors import UserError, nearest
from infra.files import regular_file

Settings = TypeVar("Settings")


def load_settings(cls: type[Settings], recipe: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Read ``recipe`` (YAML), apply ``--section.key=value`` overrides and validate the result against ``cls``.

    Raises UserError with the file, the key, the value found and what is allowed.
    """
    tree = _read(recipe) if recipe else OmegaConf.create({})
    source = recipe.name if recipe else "settings"
    _refuse_unknown(cls, _plain(tree, source), source)
    for override in overrides:
        tree = _override(cls, tree, override)
    return _validate(cls, _plain(tree, source), source)


def change_settings(settings: Settings, changes: Mapping[str, Any], source: str) -> Settings:
    """Return a validated copy of ``settings`` with other values; ``settings`` stays as it is.

    Args:
        settings: the settings to copy.
        changes: a mapping of keys to values per section, ``{"batch": {"global": 16}}``. As with ``--section.key=value``, a
            value replaces the old one as a whole, and a key may have dots: ``{"deepspeed": {"zero_optimization.stage": 2}}``.
        source: what error messages name as the place of the changes.

    Raises UserError with the key, the value found and what is allowed.
    """
    tree = OmegaConf.create(to_dict(settings))
    for section, values in changes.items():
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {section}={values!r} must be a mapping of the section's keys to values")
        changed = OmegaConf.create({})
        for key, value in values.items():
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            try:
                OmegaConf.update(changed, f"{section}.{key}", plain, force_add=True)
            except OmegaConfBaseException as error:
                raise UserError(f"{source}: {section}.{key}: {' '.join(str(error).split())}") from None
        _refuse_unknown(type(settings), _plain(changed, source) or {section: {}}, source)
        for key in values:
            name = f"{section}.{key}"
            OmegaConf.update(tree, name, OmegaConf.select(changed, name), merge=False, force_add=True)
    return _validate(type(settings), _plain(tree, source), source)


def _validate(cls: type[Settings], tree: Mapping[str, Any], source: str) -> Settings:
    try:
        return TypeAdapter(cls).validate_python(_escape(tree))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(key).removesuffix("_") for key in first["loc"]) or "(top)"
        value = first["input"]
        found = "" if isinstance(value, Mapping) and first["type"] == "missing" else f", found {value!r}"
        raise UserError(f"{source}: {key}: {first['msg']}{found}; set it in the recipe or with --{key}=VALUE") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """Return settings as nested dictionaries, in the order of the dataclass fields."""
    plain: dict[str, Any] = _unescape(TypeAdapter(type(settings)).dump_python(settings, mode="json"))
    return plain


def to_yaml(settings: Any) -> str:
    """Return settings as YAML; ``load_settings`` reads it back to equal settings."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(settings)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries: ``{"loss": {"bandwidth": 5}}`` -> ``{"loss.bandwidth": 5}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(recipe: Path) -> Any:
    try:
        tree = OmegaConf.load(regular_file(recipe))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"recipe {recipe} not found; use the name of a shipped recipe or the path of a YAML file"
        ) from None
    except Exception as error:  # the parser has many exception types; each means invalid YAML
        raise UserError(f"recipe {recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(tree):
        raise UserError(f"recipe {recipe} must be a mapping of sections, found {type(tree).__name__}")
    return tree


def _override(cls: type[Any], tree: Any, override: str) -> Any:
    name, equals, _ = override.removeprefix("--").partition("=")
    if not override.startswith("--") or not equals:
        raise UserError(f"override {override!r} is not of the form --section.key=value")
    try:
        value = OmegaConf.from_dotlist([override[2:]])
    except Exception as error:  # the parser has many exception types; each means invalid YAML
        raise UserError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    _refuse_unknown(cls, _plain(value, f"--{name}"), f"--{name}")
    # Replace the old value as a whole: merging mappings or lists would keep entries that the override leaves out.
    OmegaConf.update(tree, name, OmegaConf.select(value, name), merge=False, force_add=True)
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
            valid = ", ".join(f.name.removesuffix("_") for f in dataclasses.fields(cls))
            full = f"{prefix}{key}"
            raise UserError(f"{source}: unknown key {full!r}{nearest(str(key), hints)}; allowed here: {valid}")
        hint = hints[key]
        if typing.get_origin(hint) is dict and isinstance(value, Mapping):
            entry_class = _section(typing.get_args(hint)[1])
            sections = [(f"{prefix}{key}.{name}.", entry_class, entry) for name, entry in value.items()]
        else:
            sections = [(f"{prefix}{key}.", _section(hint), value)]
        for path, section, content in sections:
            if section is not None and isinstance(content, Mapping):
                _refuse_unknown(section, content, source, path)


def _escape(tree: Any) -> Any:
    """Append an underscore to keys that are Python keywords (``global`` -> ``global_``), as in the dataclass fields."""
    if isinstance(tree, Mapping):
        return {f"{key}_" if keyword.iskeyword(str(key)) else key: _escape(value) for key, value in tree.items()}
    return tree


def _unescape(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key[:-1] if keyword.iskeyword(str(key)[:-1]) else key: _unescape(value) for key, value in tree.items()}
    return tree


def _section(annotation: Any) -> type[Any] | None:
    """Return the dataclass in an annotation (``Loss`` or ``Loss | None``), or None."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    candidates = typing.get_args(annotation) if union else [annotation]
    for candidate in candidates:
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None
