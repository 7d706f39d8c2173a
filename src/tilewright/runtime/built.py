"""The result of building a program, its manifest and source text, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from tilewright.ir.body import Body
from tilewright.runtime.manifest import Manifest, manifest_from, tuples


@dataclass(frozen=True, slots=True)
class Built:
    """The result of lowering and rendering: enough to compile, load and call a kernel. `bodies`:
    of each launch on a GPU, all with one text, which is part of `source`."""

    manifest: Manifest
    source: str
    entries: tuple[str, ...]
    bodies: tuple[Body, ...] = ()

    def to_bytes(self) -> bytes:
        """One line of JSON, then the source as it is (escaping it in JSON took 0.1 ms to undo)."""
        text = self.bodies[0].text if self.bodies else ""
        begin = self.source.index(text)
        head = {
            "entries": self.entries, "manifest": asdict(self.manifest),
            "bodies": [asdict(replace(b, text="")) for b in self.bodies],
            "text": (begin, begin + len(text)),
        }  # fmt: skip
        return f"{json.dumps(head)}\n{self.source}".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Built | None:
        """The value that `to_bytes` wrote; None for bytes of any other form."""
        try:
            head, _, rest = data.partition(b"\n")
            fields, source = json.loads(head), rest.decode()
            entries, (begin, end) = tuple(fields["entries"]), fields["text"]
            if not all(isinstance(text, str) for text in entries):
                return None
            bodies = [Body(**tuples(b) | {"text": source[begin:end]}) for b in fields["bodies"]]
            return cls(manifest_from(fields["manifest"]), source, entries, tuple(bodies))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
