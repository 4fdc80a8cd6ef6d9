"""DeepSpeed: engine, configuration, optimizers."""
