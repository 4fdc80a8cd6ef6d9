"""Volumes: grids, file formats, resampling, intensities."""
