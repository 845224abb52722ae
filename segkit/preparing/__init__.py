"""From volumes to patches: planning, preprocessing, its cache, augmentation, patch sampling and holes."""
