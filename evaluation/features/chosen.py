"""What was chosen on inner folds, in words. It needs no library, so that a comparison need not import torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def choices_text(choices: Sequence[Mapping[str, Any]]) -> str:
    """Return which features were chosen in how many folds, the most frequent first; empty if none were chosen."""
    names = [
        " ".join(str(choice[key]) for key in ("layer", "pooling", "scale")) for choice in choices if "scale" in choice
    ]
    return ", ".join(f"{name} ({number} of {len(names)} folds)" for name, number in Counter(names).most_common())
