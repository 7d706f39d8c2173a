"""All nodes of the IR under one name: `from tilewright.ir import nodes as ir`."""

from tilewright.ir.expr import *  # noqa: F403
from tilewright.ir.stmt import *  # noqa: F403
