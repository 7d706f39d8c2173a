"""A built program, callable. The first call of a layout checks everything and fills a frame; later
calls of that layout only write addresses into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime.call import (
    Call,
    Frame,
    Result,
    Span,
    check_apart,
    scalar_value,
    value_spans,
)
from tilewright.runtime.layout import Struct
from tilewright.runtime.manifest import Manifest, structs
from tilewright.runtime.view import address, layout, view

DENSE, SPARSE = "dense", "sparse"
FRAMES_KEPT = 64  # layouts remembered by one kernel


class Launcher:
    """What a target does with a filled frame."""

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        """A function that launches the frame as it then stands."""
        raise NotImplementedError

    def launches(self, kernel: Kernel, frame: Frame) -> Sequence[Any]:
        """The frame's launches as plain data, for a recorded step; none without native code."""
        return ()


class Kernel:
    """A built program. Call it with its parameters in order, or by name; outputs are allocated by
    the framework of the first dense argument, or given as `out=` (a tuple for several).

    Raises ArgumentError (A codes) before anything is written. `source` is the generated text,
    `report()` what the compiler said of it. Copies and pickles hold the source: it is compiled,
    through the cache, where they are loaded.
    """

    rebuilt: tuple[Callable[..., Kernel], tuple[Any, ...]]
    """The function, and its arguments, that makes the kernel again; `build` sets it."""

    def __init__(
        self, manifest: Manifest, launcher: Launcher, source: str, resources: Any = None
    ) -> None:
        self.manifest, self.launcher, self.source, self.resources = (
            manifest,
            launcher,
            source,
            resources,
        )
        self.inputs = [t for t in manifest.tensors if t.role in ("input", "update")]
        self.results = [t for t in manifest.tensors if t.role == "output"]
        self.temps = [t for t in manifest.tensors if t.role == "temp"]
        self.updates = [n for n, t in enumerate(self.inputs) if t.role == "update"]
        self._dtypes = {t.name: dtypes.ALL[t.dtype] for t in manifest.tensors}
        self._frames: dict[Any, list[Frame]] = {}
        self._specs = [  # how an argument is looked at in later calls; a number by its own spec
            SPARSE if t.structure else DENSE if t.dims or t.role == "output" else t
            for t in (*self.inputs, *self.results)
        ]

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        if named or len(args) != len(self.inputs):
            args = self._matched(args, named)
        outs = () if out is None else out if isinstance(out, tuple) else (out,)
        try:
            key, places, keep = self._layout(args, outs)
        except ArgumentError:
            self._first(args, outs)  # says which argument it is
            raise
        ready = self._frames.get(key)
        if ready:
            frame = ready.pop()
            made = self._refill(frame, places, args, outs)
        else:
            frame, made = self._first(args, outs)
            if ready is None:
                if len(self._frames) >= FRAMES_KEPT:
                    self._frames.clear()
                ready = self._frames[key] = []
                self._forget_with(key, frame)
        assert frame.run is not None
        frame.run()
        del keep  # until here
        ready.append(frame)
        return self._returned(made, args)

    def bind(self, *args: Any, out: Any = None, **named: Any) -> Bound:
        """A call with everything fixed: running it again costs one native call. The arrays must
        stay where they are; their contents may change."""
        if named or len(args) != len(self.inputs):
            args = self._matched(args, named)
        outs = () if out is None else out if isinstance(out, tuple) else (out,)
        frame, made = self._first(args, outs)
        frame.keep += [*args, *made]
        return Bound(self, frame, self._returned(made, args))

    def report(self) -> str:
        """Entries, threads, binary searches inside loops, and registers, shared memory and spills
        where the compiler tells them."""
        lines = [f"{self.manifest.name} for {self.manifest.target}"]
        for s in self.manifest.stages:
            used = (self.resources or {}).get(s.entry)
            threads = s.threads[0] * s.threads[1]
            lines.append(
                f"  {s.entry}: {len(s.units)} bodies, {threads} threads"
                + (f", {used}" if used else "")
            )
            lines += [
                f"    binary search in {array} for each iteration of {depth} nested loops"
                for array, depth in s.searches
            ]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Callable[..., Kernel], tuple[Any, ...]]:
        return self.rebuilt

    def __repr__(self) -> str:
        args = ", ".join(t.name for t in self.inputs)
        return f"<kernel {self.manifest.name}({args}) for {self.manifest.target}>"

    # -- the first call of a layout --------------------------------------------------------------

    def _first(self, args: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[Frame, list[Any]]:
        call = Call(self.manifest, self._dtypes)
        for spec, arg in zip(self.inputs, args, strict=True):
            call.take(spec, arg)
        if outs and len(outs) != len(self.results):
            raise ArgumentError(
                "A101", f"{len(outs)} outputs given, {len(self.results)} expected", where="out"
            )
        made, given = [], []
        for n, spec in enumerate(self.results):
            if outs and outs[n] is not None:
                call.take_output(spec, outs[n])
                given.append(spec)
                made.append(outs[n])
            else:
                made.append(call.make_output(spec))
        updated = [self.inputs[n] for n in self.updates]
        read = [t for t in self.inputs if t.role != "update"]
        check_apart(call.spans([*given, *updated]), call.spans(read))
        temps = [call.make_output(spec) for spec in self.temps]
        frame = call.frame(*self._structs, self.results)
        frame.keep += temps
        frame.run = self.launcher.prepare(self, frame)
        return frame, made

    def _forget_with(self, key: Any, frame: Frame) -> None:
        """The key names structures by `id`: it goes when one of them does, before another object
        can have that number."""
        for name in frame.structures.values():
            structure = name()
            if structure is not None:
                weakref.finalize(structure, self._frames.pop, key, None).atexit = False

    # -- later calls -----------------------------------------------------------------------------

    def _layout(
        self, args: tuple[Any, ...], outs: tuple[Any, ...]
    ) -> tuple[Any, list[Any], list[Any]]:
        """What must be equal for a frame to fit; what goes into its slots; what must live on."""
        key: list[Any] = []
        places: list[Any] = []
        keep: list[Any] = []
        specs = self._specs
        for n, arg in enumerate((*args, *outs) if outs else args):
            spec = specs[n] if n < len(specs) else DENSE
            if spec is DENSE and arg is not None:
                same, pointer, owner = layout(arg)
                key += (same, pointer & 15)
                places.append(pointer)
                if owner is not None:
                    keep.append(owner)
                continue
            places.append(arg)
            if arg is None:
                key.append(None)
            elif spec is SPARSE:
                structure = getattr(arg, "structure", None)  # None: the first call says what it is
                key += (id(structure), structure and (arg.dtype.name, arg.fill))
        return (*key, len(outs)), places, keep

    def _refill(
        self, frame: Frame, places: list[Any], args: tuple[Any, ...], outs: tuple[Any, ...]
    ) -> list[Any]:
        """Writes the addresses of a call into a frame of its layout; the outputs."""
        for slot, n in frame.addresses:
            slot.value = places[n]
        for slot, n, part in frame.values:
            slot.value = address(places[n].values[part])
        for n, slots in frame.numbers:
            spec = self.inputs[n]
            value = scalar_value(spec, self._dtypes[spec.name], places[n])
            for slot in slots:
                slot.value = value
        if self.updates or outs:
            self._check_apart(frame, places, args, outs)
        made: list[Any] = []
        for n, result in enumerate(frame.results):
            given = outs[n] if outs else None
            if result.spec.structure:
                array = self._sparse_result(result, args, given)
                for slot, part in result.slots:
                    slot.value = address(array.values[part])
                made.append(array)
                continue
            if given is None:
                like = self._like(args) if result.like is None else args[result.like]
                array = result.make(like)
                pointer = address(array)
            else:
                array, pointer = given, places[len(args) + n]
            for slot, _ in result.slots:
                slot.value = pointer
            made.append(array)
        return made

    def _sparse_result(self, result: Result, args: tuple[Any, ...], given: Any) -> Any:
        spec = result.spec
        sparse = {t.name: a for a, t in zip(args, self.inputs, strict=True) if t.structure}
        if given is not None:
            return given
        like = next(sparse[t.name] for t in self.inputs if t.structure == spec.structure)
        return result.make(like)

    def _like(self, args: tuple[Any, ...]) -> Any:
        """Values of a sparse argument, where there is no dense one to resemble."""
        return next(a for a in args if hasattr(a, "values")).values[0]

    def _check_apart(
        self, frame: Frame, places: list[Any], args: tuple[Any, ...], outs: tuple[Any, ...]
    ) -> None:
        """Refuses memory that is written and meets memory of another argument, like the first call
        of the layout."""
        written: list[Span] = []
        read: list[Span] = []
        for n, (t, reach) in enumerate(zip(self.inputs, frame.reach, strict=True)):
            if t.structure:
                read += value_spans(t.name, args[n])
            elif t.dims:
                span = t.name, places[n] + reach[0], places[n] + reach[1]
                (written if t.role == "update" else read).append(span)
        for n, (result, given) in enumerate(zip(frame.results, outs, strict=False)):
            if given is None:
                continue
            if result.spec.structure:
                if any(view(v).readonly for v in given.values):
                    self._first(args, outs)  # says so
                written += value_spans(result.spec.name, given)
            else:
                low, high = (places[len(args) + n] + at for at in result.reach)
                written.append((result.spec.name, low, high))
        check_apart(written, read)

    def _returned(self, made: list[Any], args: tuple[Any, ...]) -> Any:
        if len(made) == 1 and not self.updates:
            return made[0]
        everything = [*made, *(args[n] for n in self.updates)]
        return everything[0] if len(everything) == 1 else tuple(everything)

    def _matched(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        names = [t.name for t in self.inputs]
        for name in named:
            if name not in names:
                raise ArgumentError(
                    "A101", f"{self.manifest.name} has no argument {name!r}", where=name,
                    hint=f"arguments: {', '.join(names)}",
                )  # fmt: skip
        given = dict(zip(names, args, strict=False))
        missing = [n for n in names if n not in given and n not in named]
        if len(args) > len(names) or missing or given.keys() & named.keys():
            which = f"missing: {', '.join(missing)}" if missing else "too many, or one given twice"
            raise ArgumentError(
                "A101",
                f"{self.manifest.name}: {which}",
                where="arguments",
                hint=f"arguments: {', '.join(names)}",
            )
        return tuple(given[n] if n in given else named[n] for n in names)

    @cached_property
    def _structs(self) -> tuple[Struct, Struct]:
        """A row of the work table, and the parameter block: what a call needs and a build does
        not."""
        return structs(self.manifest)


class Bound:
    """A call with its arguments fixed. `outputs` is what it writes; calling it returns that."""

    __slots__ = ("_run", "frame", "kernel", "outputs")

    def __init__(self, kernel: Kernel, frame: Frame, outputs: Any) -> None:
        assert frame.run is not None
        self.kernel, self.frame, self.outputs = kernel, frame, outputs
        self._run = frame.run

    def __call__(self) -> Any:
        self._run()
        return self.outputs

    def __repr__(self) -> str:
        return f"<bound {self.kernel!r}, {sum(self.frame.units)} units>"
