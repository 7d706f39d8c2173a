"""The operators' schedules by name, for programs of one's own: `tw.recipes.spmm`."""

from tilewright.ops.spmm import recipe as spmm

__all__ = ["spmm"]
