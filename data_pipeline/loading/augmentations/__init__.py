"""The augmentation operators, one file each (flip, affine and crop share the file of their fused warp)."""
