"""The simulated experiment of docs/experiments.md."""
