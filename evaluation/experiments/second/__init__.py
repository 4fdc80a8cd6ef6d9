"""The second experiment, docs/experiments_2.md: spatial features, readouts, three levels of realism."""
