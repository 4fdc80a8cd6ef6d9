"""Volumes: reading, checking, grids and decoders."""
