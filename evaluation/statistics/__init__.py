"""Metrics, intervals and paired tests."""
