"""The training engine: DeepSpeed with its configuration, optimisers, weight average, gradient cache and resharding."""
