"""Sparse tensors: formats as lists of levels, packing, the traced language, decomposition."""
