"""LAMB and LARS in plain NumPy, one layer at a time, as in their papers."""

from __future__ import annotations

import numpy as np


def lamb(weights, gradients, lr, betas=(0.9, 0.999), decay=0.0, scaled=True, epsilon=1e-6):
    """Return the weights after one step per gradient: algorithm 2 of arXiv:1904.00962 with φ the identity."""
    w = np.array(weights, dtype=np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, dtype=np.float64)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + epsilon) + decay * w
        size, length = np.sqrt((w**2).sum()), np.sqrt((step**2).sum())
        ratio = size / length if scaled and size > 0 and length > 0 else 1.0
        w = w - lr * ratio * step
    return w


def lars(weights, gradients, lr, decay=0.0, scaled=True, momentum=0.9, trust=1e-3):
    """Return the weights after one step per gradient: algorithm 1 of arXiv:1708.03888."""
    w = np.array(weights, dtype=np.float64)
    velocity = np.zeros_like(w)
    for gradient in gradients:
        g = np.asarray(gradient, dtype=np.float64)
        size, length = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
        rate = trust * size / (length + decay * size) if scaled and size > 0 and length > 0 else 1.0
        velocity = momentum * velocity + lr * rate * (g + decay * w)
        w = w - velocity
    return w
