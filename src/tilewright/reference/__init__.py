"""Programs evaluated in Python: the definition of the language; CUDA-lowered IR without a GPU."""
