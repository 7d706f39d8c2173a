"""All nodes of the IR, and the functions that walk and rewrite them, under one name."""

from tilewright.ir.nodes import *  # noqa: F403
from tilewright.ir.rewrite import *  # noqa: F403
