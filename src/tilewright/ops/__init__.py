"""Operators written in the language, each with its recipes. They take arrays and packed tensors.

The file of an operator has its program, its schedule for each target, and the function that a user
calls, which selects format and schedule by shape.
"""

from tilewright.ops.gemm import gemm
from tilewright.ops.sddmm import pack_for_sddmm, sddmm
from tilewright.ops.sparse_results import add, multiply, spgemm
from tilewright.ops.spmm import pack_for_spmm, spmm

__all__ = [
    "add", "gemm", "multiply", "pack_for_sddmm", "pack_for_spmm", "sddmm", "spgemm", "spmm",
]  # fmt: skip
