"""Batch jobs of SLURM: written and submitted, run on Ray in their allocation, and queued again."""
