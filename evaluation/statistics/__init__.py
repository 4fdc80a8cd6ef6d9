"""Metrics, confidence intervals, paired tests, subgroups and brain age."""
