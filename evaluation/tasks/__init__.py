"""Downstream tasks: labels, folds and guards against leakage."""
