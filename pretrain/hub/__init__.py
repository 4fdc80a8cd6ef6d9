"""Encoders at the Hugging Face hub: their card, and reading them by name."""
