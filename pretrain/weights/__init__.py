"""Pretrained weights: reading, embedding, writing, importing."""
