"""Typed reads of what a model's file says: the keys of a GGUF file or of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.errors import ModelError

Value = int | float | bool | str | np.ndarray | list[str]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed reads of metadata. A key of another type, or absent without a default, raises a
    ModelError of `code` that names the key."""

    values: Mapping[str, Any]
    where: str = ""
    code: str = "M101"

    def _read(self, key: str, default: Any, kinds: tuple[type, ...], needed: str) -> Any:
        value = self.values.get(key, default)
        if isinstance(value, kinds) and isinstance(value, bool) == (bool in kinds):
            return value
        raise ModelError(
            self.code, f"{key} is {short(value)}, {needed} is needed", where=self.where or key
        )

    def integer(self, key: str, default: int | None = None) -> int:
        return self._read(key, default, (int,), "an integer")

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._read(key, default, (int, float), "a number"))

    def text(self, key: str, default: str | None = None) -> str:
        return self._read(key, default, (str,), "a text")

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._read(key, default, (bool,), "true or false")

    def strings(self, key: str) -> list[str]:
        return self._read(key, None, (list,), "an array of texts")

    def refuse(self, key: str, harmless: tuple[Value, ...]) -> None:
        """Raises ModelError[M102] for a key with another value than `harmless` ones."""
        value = self.values.get(key, harmless[0])
        if not isinstance(value, int | float | str) or value not in harmless:
            raise ModelError("M102", f"{key} = {short(value)} is not supported", where=self.where)


def short(value: Any) -> str:
    """A value of the metadata, for a message."""
    if value is None:
        return "missing"
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    return repr(value[:60] if isinstance(value, str) else value)
