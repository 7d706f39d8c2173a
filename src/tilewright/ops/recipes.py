"""`tw.recipes`: schedules of operators for a user's programs, as `tw.recipes.spmm`."""

from tilewright.ops.spmm import recipe as spmm

__all__ = ["spmm"]
