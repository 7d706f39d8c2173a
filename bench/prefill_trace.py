"""A trace of the Hopper prefill kernel: what each warp of one CTA does, cycle by cycle.

`bench prefill --trace FILE.json` compiles the kernel of a row with TW_TRACE, runs it once warm and
once for the record, writes the record for Perfetto (https://ui.perfetto.dev; a nanosecond there is
a cycle here) and draws FILE.svg from it. The clocks cost a few per cent of the time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import note, require_torch
from tilewright.attention.spec import loaded, template
from tilewright.errors import MissingExtra

MARKS = 1024  # the most of a warp
STEPS_BEFORE, STEPS_AFTER = 3, 5  # of the picture, around the end of an item
COLOURS = {  # of states that work; a warp that waits is pale
    "ISSUE": "#4477aa", "MASK": "#ccbb44", "MAXIMA": "#66ccee", "WEIGHTS": "#228833",
    "WEIGHTS_AND_PACK": "#88bb66", "WRITE": "#ee6677", "LOAD": "#aa3377", "SORT_TILES": "#999933",
}  # fmt: skip
WAITING = "#dddddd"


@dataclass(frozen=True, slots=True)
class Span:
    """From `begin` to `end` (cycles) a warp is in `state`."""

    warp: str
    state: str
    begin: int
    end: int


def states() -> list[str]:
    """The names of the states, in the order of their numbers: `State` of the kernel."""
    names = re.search(r"enum State \{([^}]*)\}", template("prefill_hopper.cuh"))
    assert names is not None
    return [name.strip() for name in names[1].split(",")]


def record(bound: Any) -> list[Span]:
    """The spans of CTA 0 of a bound call of the Hopper family."""
    torch = require_torch()
    grid, block, smem_bytes = bound.launch.grid, bound.launch.block, bound.launch.smem_bytes
    warps = block[0] // 32
    marks = torch.zeros(warps, MARKS, 2, dtype=torch.int32, device="cuda")
    head = f"#define TW_TRACE {MARKS}\n#define TW_TRACE_AT {marks.data_ptr()}ull\n"
    function = loaded(head + bound.source, marks.device.index)
    launch = function.prepare(grid, block, smem_bytes, bound.launch.params)
    for _ in range(2):
        marks.zero_()
        launch.run(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    consumers = int(re.findall(r"int CONSUMERS = (\d+)", bound.source)[0])
    return spans(marks.cpu().tolist(), warp_names(warps, consumers))


def warp_names(warps: int, consumers: int) -> list[str]:
    """What each warp does: a scheduler, loaders of K, as many of V, one of Q, the consumers."""
    each = (warps - 4 * consumers - 2) // 2
    loaders = [f"loader {x}" + (f".{i}" if i else "") for x in "KV" for i in range(each)]
    lines = (f"consumer {group}.{warp}" for group in range(consumers) for warp in range(4))
    return ["scheduler", *loaders, "loader Q", *lines]


def spans(marks: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> list[Span]:
    """Spans between neighbouring marks (cycle, state) of each warp; the earliest mark is cycle 0.
    Cycles count modulo 2³²."""
    known = states()
    ends = known.index("END")
    lines = []
    for line in marks:
        last = next((i for i, (_, state) in enumerate(line) if state == ends), len(line) - 1)
        lines.append(line[: last + 1])
    zero = lines[0][0][0]
    since = [[((cycle - zero + 2**31) % 2**32 - 2**31, state) for cycle, state in x] for x in lines]
    first = min(line[0][0] for line in since)
    return [
        Span(name, known[state], begin - first, end - first)
        for name, line in zip(names, since, strict=True)
        for (begin, state), (end, _) in itertools.pairwise(line)
    ]


def write(path: Path, found: Sequence[Span]) -> None:
    """The spans as a trace that Perfetto opens."""
    names = list(dict.fromkeys(span.warp for span in found))
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": n, "args": {"name": name}}
        for n, name in enumerate(names)
    ]
    events += [
        {
            "ph": "X", "name": span.state.lower().replace("_", " "), "pid": 0,
            "tid": names.index(span.warp), "ts": span.begin / 1000,
            "dur": (span.end - span.begin) / 1000,
        }
        for span in found
    ]  # fmt: skip
    text = json.dumps({"displayTimeUnit": "ns", "traceEvents": events})
    path.write_text(text, encoding="utf-8")


def read(path: Path) -> list[Span]:
    """The spans that `write` wrote."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    return [
        Span(
            names[e["tid"]], e["name"].upper().replace(" ", "_"), round(e["ts"] * 1000),
            round((e["ts"] + e["dur"]) * 1000),
        )
        for e in events
        if e["ph"] == "X"
    ]  # fmt: skip


def window(found: Sequence[Span]) -> tuple[int, int]:
    """The cycles that the picture shows: some steps around the end of the first item."""
    line = [span for span in found if span.warp == "consumer 0.0"]
    issues = [span.begin for span in line if span.state == "ISSUE"]
    writes = [span.begin for span in line if span.state == "WRITE"]
    middle = writes[min(1, len(writes) - 1)]  # the first is of the empty item in front of all
    at = sum(begin < middle for begin in issues)
    last = min(at + STEPS_AFTER, len(issues) - 1)
    return issues[max(0, at - 1 - STEPS_BEFORE)], issues[last]


def draw(found: Sequence[Span], path: Path) -> None:
    """The picture of a window. Raises MissingExtra[E101] without matplotlib."""
    from bench.plot import pyplot_module

    pyplot = pyplot_module()
    begin, end = window(found)
    rows = ["scheduler", "loader Q", "loader K", "loader V", "consumer 0.0", "consumer 1.0"]
    with pyplot.rc_context({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": "trace"}):
        figure, axes = pyplot.subplots(figsize=(11, 3.6), layout="constrained")
        for y, row in enumerate(reversed(rows)):
            shown = [s for s in found if s.warp == row and s.end > begin and s.begin < end]
            for colour in (WAITING, *COLOURS.values()):
                bars = [
                    (max(s.begin, begin) - begin, min(s.end, end) - max(s.begin, begin))
                    for s in shown
                    if COLOURS.get(s.state, WAITING) == colour
                ]
                axes.broken_barh(bars, (y - 0.36, 0.72), color=colour, linewidth=0)
        axes.set_yticks(range(len(rows)), [row.removesuffix(".0") for row in reversed(rows)])
        axes.set_xlim(0, end - begin)
        axes.set_xlabel("cycles")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        patches = [
            pyplot.Rectangle((0, 0), 1, 1, color=colour, label=state.lower().replace("_", " "))
            for state, colour in (*COLOURS.items(), ("wait", WAITING))
        ]
        figure.legend(handles=patches, loc="outside upper center", ncols=9, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def trace(batch: Any, path: Path) -> None:
    """Record our call of a `prefill.Batch`, check its result, write the trace and draw it."""
    bound = batch.bound(range(len(batch.case.queries)))
    if '#include "prefill_hopper.cuh"' not in bound.source:
        note("the row is not run by the Hopper family: nothing is traced")
        return
    found = record(bound)
    note(f"relative error of the traced run: {batch.error(lambda: bound.state.o):.2g}")
    write(path, found)
    try:
        draw(found, path.with_suffix(".svg"))
    except MissingExtra as missing:
        note(f"no picture: {missing}")
