"""Models, one file each: weights and the order of the layers, without a cache or buffers."""
