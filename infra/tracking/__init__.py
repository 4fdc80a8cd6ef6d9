"""MLflow: tracking of runs, queries, model registry."""
