"""From source text to binaries: the C++ compiler, NVRTC and the caches on disk."""
