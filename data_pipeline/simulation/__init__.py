"""Simulated cohorts of grey-matter maps."""
