"""Processes that end with the process that started them, also if that one is killed, and their limits."""
