"""Protocols: how checkpoints, architectures and voxels are evaluated on tasks."""
