"""Pretrained encoders: read, write, import and find them; compute features of scans."""
