"""Simulated cohorts of grey-matter maps and T1-like images."""
