"""Doors to other systems, imported by name: `compat` (FlashInfer's calls), `torch_ops` (operators
for torch.compile), `hf` (attention of Hugging Face transformers)."""

from importlib import import_module
from typing import Any

from tilewright.errors import MissingExtra


def needed(package: str, extra: str) -> Any:
    """An optional package. Raises MissingExtra[E101]."""
    try:
        return import_module(package)
    except ImportError as error:
        hint = f"pip install 'tilewright[{extra}]'"
        raise MissingExtra("E101", f"{package} is needed: {error}", hint=hint) from None
