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
from tilewright.runtime.call import Call, Frame, check_values_apart, scalar_value, sparse_output
from tilewright.runtime.manifest import Manifest, TensorSpec, structs, unit_count
from tilewright.runtime.view import allocate, overlaps, view

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
    `report()` what the compiler said of it.
    """

    def __init__(
        self, manifest: Manifest, launcher: Launcher, source: str, resources: Any = None
    ) -> None:
        self.manifest, self.launcher, self.source, self.resources = (
            manifest,
            launcher,
            source,
            resources,
        )
        self.row, self.params = structs(manifest)
        self.inputs = [t for t in manifest.tensors if t.role in ("input", "update")]
        self.results = [t for t in manifest.tensors if t.role == "output"]
        self.temps = [t for t in manifest.tensors if t.role == "temp"]
        self.updates = [n for n, t in enumerate(self.inputs) if t.role == "update"]
        self._dtypes = {t.name: dtypes.ALL[t.dtype] for t in manifest.tensors}
        self._frames: dict[Any, list[Frame]] = {}
        self._sparse = [bool(t.structure) for t in self.inputs]
        self._numbers = [not t.structure and not t.dims for t in self.inputs]

    # -- calling ---------------------------------------------------------------------------------

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        if named or len(args) != len(self.inputs):
            args = self._matched(args, named)
        outs = () if out is None else out if isinstance(out, tuple) else (out,)
        key, addresses = self._layout(args, outs)
        ready = self._frames.get(key)
        if ready:
            frame = ready.pop()
            made = self._reuse(frame, addresses, args, outs)
        else:
            frame, made = self._first(args, outs)
            if ready is None:
                if len(self._frames) >= FRAMES_KEPT:
                    self._frames.clear()
                ready = self._frames[key] = []
                self._forget_with(key, frame)
        assert frame.run is not None
        frame.run()
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
        """Entries, threads, and registers, shared memory and spills where the compiler tells
        them."""
        lines = [f"{self.manifest.name} for {self.manifest.target}"]
        for s in self.manifest.stages:
            found = (self.resources or {}).get(s.entry)
            lines.append(
                f"  {s.entry}: {len(s.units)} bodies, {s.threads[0] * s.threads[1]} threads, "
                f"{found or ''}"
            )
        return "\n".join(lines)

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
        made = []
        for n, spec in enumerate(self.results):
            if outs and outs[n] is not None:
                call.take_output(spec, outs[n], self.inputs)
                made.append(outs[n])
            else:
                made.append(call.make_output(spec))
        temps = [call.make_output(spec) for spec in self.temps]
        frame = call.frame(self.row, self.params, self._unit_counts, self.results)
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

    def _layout(self, args: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """What must be equal for a frame to fit, and what goes into its slots."""
        key: list[Any] = []
        addresses: list[Any] = []
        aligned = 0
        for n, arg in enumerate((*args, *outs)):
            if n < len(args) and self._numbers[n]:
                key.append(None)
                addresses.append(arg)
            elif (self._sparse[n] if n < len(args) else hasattr(arg, "structure")) and hasattr(
                arg, "structure"
            ):
                key += (id(arg.structure), arg.dtype)
                addresses.append(arg)
            elif arg is None:
                key.append("made")
                addresses.append(None)
            else:
                v = self._view(arg, n)
                key += (v.dtype, v.shape, v.strides, v.device, v.readonly)
                aligned |= v.pointer & 15
                addresses.append(v)
        key += (aligned == 0, len(outs))
        return tuple(key), addresses

    def _view(self, arg: Any, n: int) -> Any:
        try:
            return view(arg)
        except ArgumentError as e:
            names = [*(t.name for t in self.inputs), *(t.name for t in self.results)]
            if n < len(self.inputs) and self._sparse[n]:
                raise ArgumentError(
                    "A106", f"{names[n]} is sparse but a {type(arg).__name__} was given",
                    where=f"argument {names[n]}", hint="pack it: fmt.pack(matrix)",
                ) from None  # fmt: skip
            where = f"argument {names[min(n, len(names) - 1)]}"
            raise ArgumentError(e.code, e.message, where=where, hint=e.hint) from None

    def _reuse(
        self, frame: Frame, addresses: list[Any], args: tuple[Any, ...], outs: tuple[Any, ...]
    ) -> list[Any]:
        slots = frame.slots
        for n, spec in enumerate(self.inputs):
            what = addresses[n]
            if self._sparse[n]:
                _point(slots.get(spec.name, ()), what)
            elif self._numbers[n]:
                value = scalar_value(spec, self._dtypes[spec.name], what)
                for slot in slots.get(spec.name, ()):
                    slot.value = value
            else:
                for slot in slots.get(spec.name, ()):
                    slot.value = what.pointer
        made: list[Any] = []
        for n, (spec, shape) in enumerate(frame.outputs):
            given = outs[n] if outs else None
            if spec.structure:
                like = next(
                    a
                    for a, t in zip(args, self.inputs, strict=True)
                    if t.structure == spec.structure
                )
                array = given if given is not None else sparse_output(like, self._dtypes[spec.name])
                if given is not None:
                    sparse = {
                        t.name: a for a, t in zip(args, self.inputs, strict=True) if t.structure
                    }
                    check_values_apart(given, spec.name, sparse)
                _point(slots.get(spec.name, ()), array)
            else:
                array = (
                    given
                    if given is not None
                    else allocate(self._like(args), shape, self._dtypes[spec.name])
                )
                v = addresses[len(args) + n] if given is not None else view(array)
                if given is not None:
                    self._check_apart(v, addresses[: len(args)], spec)
                for slot in slots.get(spec.name, ()):
                    slot.value = v.pointer
            made.append(array)
        return made

    def _like(self, args: tuple[Any, ...]) -> Any:
        for n, a in enumerate(args):
            if not self._sparse[n] and not self._numbers[n]:
                return a
        return next(a for a in args if hasattr(a, "values")).values[0]

    def _check_apart(self, mine: Any, inputs: list[Any], spec: TensorSpec) -> None:
        for t, v in zip(self.inputs, inputs, strict=True):
            if hasattr(v, "pointer") and overlaps(mine, v):
                raise ArgumentError(
                    "A108", f"the output {spec.name} overlaps the input {t.name}", where="out",
                    hint="give it memory of its own",
                )  # fmt: skip

    def _returned(self, made: list[Any], args: tuple[Any, ...]) -> Any:
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
    def _unit_counts(self) -> tuple[tuple[Callable[..., int], ...], ...]:
        """For each stage, for each of its bodies: sizes and counts → number of units."""
        return tuple(tuple(unit_count(text) for text in s.units) for s in self.manifest.stages)


def _point(slots: Any, packed: Any) -> None:
    """The addresses of a sparse tensor's values, part by part (stage after stage), into their
    slots."""
    parts = len(packed.values)
    addresses = [view(v).pointer for v in packed.values]
    for n, slot in enumerate(slots):
        slot.value = addresses[n % parts]


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
