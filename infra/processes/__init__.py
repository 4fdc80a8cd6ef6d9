"""Processes that end with the process that started them, their limits, and the temporary folders that they leave."""
