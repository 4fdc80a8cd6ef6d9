"""Comparison of evaluated checkpoints: tables, pictures, report."""
