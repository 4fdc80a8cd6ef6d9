"""MLflow: log runs, query them, and register models."""
