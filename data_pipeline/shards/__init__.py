"""Shards: build, extend, check, repair and index them."""
