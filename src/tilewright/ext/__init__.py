"""Doors to other systems; each module needs an extra, and is imported by its name.

compat      FlashInfer's functions and wrappers over Tilewright's tables, pools and plans
torch_ops   operators of `torch.library`: attention, append, merge under torch.compile
hf          `attn_implementation="tilewright"` for Hugging Face transformers
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from tilewright.errors import MissingExtra


def needed(package: str, by: str) -> ModuleType:
    """The optional package that module `by` needs. Raises MissingExtra[E101]."""
    try:
        return import_module(package)
    except ImportError as error:
        extra = "torch" if package == "torch" else "hf"
        hint = f"pip install 'tilewright[{extra}]'"
        raise MissingExtra("E101", f"{by} needs {package}: {error}", hint=hint) from None
