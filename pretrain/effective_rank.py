"""RankMe, the effective rank of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_SCANS = 2048  # of which the rank is computed; evenly spaced ones of more


def rankme(embeddings: NDArray[Any]) -> float:
    """Return the effective rank of embeddings (n, F): 1 if all are multiples of one vector, at most min(n, F).

    The exponential of the entropy of the singular values divided by their sum (Garrido et al., ICML 2023, arXiv:2210.02885,
    without their epsilon). The embeddings are not centred, as there. It is 1 for embeddings that are all zero.
    """
    values = np.asarray(embeddings[:: -(-len(embeddings) // MOST_SCANS) or 1], dtype=np.float64)
    sizes = np.linalg.svd(values, compute_uv=False)
    sizes = sizes[sizes > 1e-12 * sizes.max(initial=0.0)]
    shares = sizes / sizes.sum() if len(sizes) else np.ones(1)
    return float(np.exp(-(shares * np.log(shares)).sum()))
