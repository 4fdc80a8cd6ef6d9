"""Tasks: labels, folds and protection against leakage."""
