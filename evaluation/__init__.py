"""From pretrained checkpoints to a defended statement about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.comparison.comparison import compare as compare
    from evaluation.protocols.evaluate import evaluate as evaluate

__all__ = ["compare", "evaluate"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import evaluation` needs neither scikit-learn nor MLflow. The loaded submodule `compare` would
    # shadow the function of that name, which is why it is fetched from the module itself.
    if name == "evaluate":
        from evaluation.protocols.evaluate import evaluate

        return evaluate
    if name == "compare":
        from evaluation.comparison.comparison import compare

        return compare
    raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
