"""Evaluation of pretrained checkpoints on downstream tasks, and their comparison."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.comparison.comparison import Comparison as Comparison
    from evaluation.comparison.comparison import compare as compare
    from evaluation.protocols.evaluate import evaluate as evaluate
    from evaluation.protocols.protocols import PROTOCOLS as PROTOCOLS

__all__ = ["PROTOCOLS", "Comparison", "compare", "evaluate"]
_MODULES = {
    "PROTOCOLS": "protocols.protocols", "Comparison": "comparison.comparison", "compare": "comparison.comparison",
    "evaluate": "protocols.evaluate",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Names are imported at their first use, so `import evaluation` needs neither scikit-learn nor MLflow.
    if name in _MODULES:
        return getattr(import_module(f"evaluation.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
