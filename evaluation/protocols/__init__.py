"""Protocols: how an encoder is judged on a task."""
