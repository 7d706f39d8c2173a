"""What a plan says of itself: balance, bytes, padding, and the time that it should take."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.attention import ranges


@dataclass(frozen=True, slots=True)
class Costs:
    """Of the decode kernel on one GPU: microseconds of a launch and of each CTA that starts with
    it; bytes/µs of the memory, as many CTAs share it; microseconds of a packed row of a unit, and
    of each partial state that a merge reads."""

    launch: float
    start: float
    memory: float
    ctas: int
    row: float
    part: float


COSTS = {"NVIDIA H200": Costs(3.33, 0.0101, 4.28e6, 264, 0.152, 0.0747)}
"""Fitted to 300 random batches (docs/design/decode-attention.md). By a GPU's name."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a report needs beside the plan: keys of each node, bytes of a key's K and V in one head,
    the families with their reasons against the call, and the name of the GPU."""

    keys: np.ndarray
    key_bytes: int
    families: tuple[tuple[str, str], ...]
    gpu: str


@dataclass(frozen=True, slots=True)
class Report:
    """`nbytes`: of keys and values, each node's once; `padding`: the share of keys of tiles that do
    not exist; `microseconds`: predicted, None where the GPU or the family has no `Costs`."""

    family: str
    refused: tuple[tuple[str, str], ...]
    imbalance: float
    padding: float
    nbytes: int
    microseconds: float | None

    def __str__(self) -> str:
        time = "unknown" if self.microseconds is None else f"{self.microseconds:.1f} µs"
        lines = [
            f"{self.family}: imbalance {self.imbalance:.2f}, padding {self.padding:.0%}, "
            f"{self.nbytes / 1e6:.1f} MB of keys and values, predicted time {time}"
        ]
        return "\n".join([*lines, *(f"not {name}: {reason}" for name, reason in self.refused)])


def report(plan: Any) -> Report:
    """The report of a plan from `Attention.plan`."""
    batch: Batch = plan.batch
    tiles = -(-batch.keys // ranges.TILE)
    padding = 1 - batch.keys.sum() / max(1, tiles.sum() * ranges.TILE)
    costs = COSTS.get(batch.gpu) if len(plan.cuts) and not plan.tree[0] else None
    nbytes = int(batch.keys.sum()) * plan.kv_heads * batch.key_bytes
    refused = tuple((name, reason) for name, reason in batch.families if reason)
    time = None if costs is None else _microseconds(plan, batch, costs, nbytes)
    return Report(plan.family, refused, plan.imbalance, float(padding), nbytes, time)


def _microseconds(plan: Any, batch: Batch, costs: Costs, nbytes: int) -> float:
    """The start of all CTAs, the CTA with the most work, and the merge of the unit with the most
    parts. The reads of a CTA take the mean of two times: that of all bytes by the whole memory, and
    that of its own by an even share of the memory."""
    cuts, together = plan.cuts, ranges.head_block(plan.kv_heads)
    order = cuts["node"].astype(np.int64) * (plan.kv_heads // together) + cuts["unit"]
    partial = cuts["tile"] > 0
    rows = (np.diff(order) + partial[1:]) * plan.longest * plan.group
    own = ranges.work(cuts, batch.keys, plan.kv_heads) * ranges.TILE * batch.key_bytes
    each = (nbytes + own * costs.ctas) / (2 * costs.memory) + rows * costs.row
    merged = 1 + int((cuts["last"] - cuts["first"])[partial].max(initial=-1))
    start = costs.launch + len(own) * together * costs.start
    return start + float(each.max(initial=0)) + merged * costs.part
