"""The operators' schedules by name, for a user's programs: `tw.recipes.spmm`."""

from tilewright.ops.spmm import recipe as spmm

__all__ = ["spmm"]
