"""What a plan says of itself: balance, bytes, padding, and the time that it should take."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.attention import ranges


@dataclass(frozen=True, slots=True)
class Costs:
    """Of the decode kernel on one GPU: microseconds of a launch; bytes/µs of the memory, and of one
    CTA beside it; microseconds of a unit and of each packed row of it, of writing a partial state,
    and of a round of merging: four rows of up to 16 states."""

    launch: float
    memory: float
    cta: float
    unit: float
    row: float
    part: float
    merge: float


COSTS = {"NVIDIA H200": Costs(3.25, 4.41e6, 311e3, 0.491, 0.0636, 1.171, 0.872)}
"""Fitted to 200 random batches (docs/design/decode-attention.md). By a GPU's name."""


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
    """The memory, then what the CTA with the most units, tiles and partial states does beside it,
    then the merge of the unit with the most parts."""
    cuts = plan.cuts
    head_blocks = plan.kv_heads // ranges.head_block(plan.kv_heads)
    order = cuts["node"].astype(np.int64) * head_blocks + cuts["unit"]
    partial, rows = cuts["tile"] > 0, plan.longest * plan.group
    units, parts = np.diff(order) + partial[1:], partial[1:].astype(int) + partial[:-1]
    tiles = ranges.work(cuts, batch.keys, plan.kv_heads)
    ctas = tiles * ranges.TILE * batch.key_bytes / costs.cta
    ctas += units * (costs.unit + costs.row * rows) + parts * costs.part
    merged = 1 + int((cuts["last"] - cuts["first"])[partial].max(initial=-1))
    rounds = -(-rows // 4) * (-(-merged // 16) if merged > 4 else min(merged, 1))
    longest = float(ctas.max(initial=0))
    return costs.launch + nbytes / costs.memory + longest + costs.merge * rounds
