"""Before and at the start of a run: forecast and launchers."""
