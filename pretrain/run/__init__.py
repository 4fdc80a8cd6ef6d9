"""One pretraining run: plan, steps, checkpoints, monitor, log."""
