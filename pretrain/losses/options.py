"""Find a loss by its name in a recipe and check the options that the recipe gives it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from infra.errors import UserError, nearest
from pretrain.losses.contrastive import LOSSES
from pretrain.losses.supervised import SUPERVISED

# Parameters that many losses share. Each is a key of its own in the recipe's ``loss:`` section.
SHARED_OPTIONS = ("temperature", "normalization", "cross_view", "tile")
# Parameters that the run supplies, each only if the loss has it.
RUN_ARGUMENTS = ("kernel", "gather", "subjects", "sites")


def find_loss(name: str) -> Callable[..., Tensor]:
    """Return the loss ``name`` of `LOSSES` or `SUPERVISED`; raises UserError if it is in neither."""
    tables = {**LOSSES, **SUPERVISED}  # read at each call: a loss may be added to a table at run time
    if name not in tables:
        raise UserError(f"loss.name={name!r} is not known{nearest(name, tables)}; allowed: {', '.join(tables)}")
    return tables[name]


def takes(loss: Callable[..., Tensor], option: str) -> bool:
    """Whether ``loss`` has a parameter ``option``."""
    return option in inspect.signature(loss).parameters


def check_own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's ``loss.options`` for the loss ``name``, each converted to its parameter's type.

    A loss's own options are its keyword-only parameters with a default, other than the shared ones and the run's. The
    parameter's annotation gives its type and limits, as in ``scale: Annotated[float, Field(gt=0)] = 2.0``.

    Raises:
        UserError: if the loss is unknown, has no such option, or a value has the wrong type or is out of its limits.
    """
    loss = find_loss(name)
    types = typing.get_type_hints(loss, include_extras=True)
    own = [
        parameter.name
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
        and parameter.default is not parameter.empty
        and parameter.name not in (*SHARED_OPTIONS, *RUN_ARGUMENTS)
    ]
    checked = {}
    for option, value in options.items():
        if option not in own:
            allowed = f"allowed: {', '.join(own)}" if own else "it has none of its own"
            raise UserError(
                f"loss.options.{option} is not an option of the loss {name}{nearest(option, own)}; {allowed}"
            )
        try:
            checked[option] = TypeAdapter(types.get(option, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"loss.options.{option}={value!r} is not possible: {error.errors()[0]['msg']}") from None
    return checked
