"""Frozen features as models get them: scaled, and reduced to inner products if there are more features than scans."""
