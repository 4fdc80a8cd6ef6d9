"""Loading: order of scans, augmentation, batches of two views."""
