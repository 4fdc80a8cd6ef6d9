"""Evaluation of pretrained checkpoints on downstream tasks, and their comparison."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison as Comparison
    from evaluation.comparison.comparison import compare as compare
    from evaluation.protocols.evaluate import evaluate as evaluate
    from evaluation.protocols.protocols import PROTOCOLS as PROTOCOLS
    from evaluation.retest.api import Reliability as Reliability
    from evaluation.retest.api import reliability as reliability

# Public name -> module. They are loaded at first use, so that `import evaluation` needs neither scikit-learn nor MLflow.
_MODULES = {
    "Comparison": "evaluation.comparison.comparison",
    "compare": "evaluation.comparison.comparison",
    "evaluate": "evaluation.protocols.evaluate",
    "PROTOCOLS": "evaluation.protocols.protocols",
    "Reliability": "evaluation.retest.api",
    "reliability": "evaluation.retest.api",
}

__all__ = ["PROTOCOLS", "Comparison", "Reliability", "compare", "evaluate", "reliability"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
