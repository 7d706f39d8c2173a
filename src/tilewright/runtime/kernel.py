"""A built program, callable. The first call of a layout checks its arguments and builds a frame;
every call writes addresses and numbers into a frame of its layout and launches it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tilewright import dtypes
from tilewright.errors import ArgumentError
from tilewright.runtime.arguments import Arguments, Span, check_overlaps, scalar_value, value_spans
from tilewright.runtime.frame import Frame, build_frame
from tilewright.runtime.manifest import Manifest
from tilewright.runtime.view import address, byte_span, layout, view

if TYPE_CHECKING:
    from tilewright.runtime.report import Report

Args = tuple[Any, ...]  # of a call, by position
DENSE, SPARSE, NUMBER = "dense", "sparse", "number"
FRAMES_KEPT = 64  # layouts that one kernel remembers


class Launcher:
    """Prepares the launches of a frame on one target."""

    def prepare(self, kernel: Kernel, frame: Frame) -> Callable[[], None]:
        """A function that launches the frame with what its blocks hold at that moment."""
        raise NotImplementedError


class Kernel:
    """A built program. Call it with its parameters in order, or by name. The framework of the first
    dense argument allocates the outputs, unless `out=` names arrays for them (a tuple for several).

    Raises ArgumentError (A codes) before anything is written. `source` is the generated text,
    `report()` what it does when it runs. Copies and pickles hold the source, which is compiled,
    through the cache, when they are loaded.
    """

    rebuilt: tuple[Callable[..., Kernel], Args]
    """The function, and its arguments, that makes the kernel again; `build` sets it."""

    def __init__(
        self, manifest: Manifest, launcher: Launcher, source: str, resources: Any = None
    ) -> None:
        self.manifest, self.launcher = manifest, launcher
        self.source, self.resources = source, resources
        self.inputs = [t for t in manifest.tensors if t.role in ("input", "update")]
        self.results = [t for t in manifest.tensors if t.role == "output"]
        self.temps = [t for t in manifest.tensors if t.role == "temp"]
        self.updates = [n for n, t in enumerate(self.inputs) if t.role == "update"]
        self._dtypes = {t.name: dtypes.ALL[t.dtype] for t in manifest.tensors}
        self._frames: dict[Any, list[Frame]] = {}
        self._kinds = [
            SPARSE if t.structure else DENSE if t.dims or t.role == "output" else NUMBER
            for t in (*self.inputs, *self.results)
        ]

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        """Run on these arguments; returns the outputs, and then what is updated."""
        if named or len(args) != len(self.inputs):
            args = self._ordered(args, named)
        outs = () if out is None else out if isinstance(out, tuple) else (out,)
        key, addresses, owners = self._layout(args, outs)
        frames = self._frames.get(key)
        try:
            frame = frames.pop() if frames else self._build_frame(args, outs)
        except IndexError:  # another thread has taken the last idle frame
            frame = self._build_frame(args, outs)
        outputs = self._fill(frame, addresses, args, outs)
        frame.run()
        del owners  # the memory was in use until here
        if frames is None:
            frames = self._remember(key, frame)
        frames.append(frame)
        return self._returned(outputs, args)

    def bind(self, *args: Any, out: Any = None, **named: Any) -> Bound:
        """Checks and prepares a call with fixed arguments, which then runs as one native call. The
        arrays must stay at their addresses; their contents may change."""
        if named or len(args) != len(self.inputs):
            args = self._ordered(args, named)
        outs = () if out is None else out if isinstance(out, tuple) else (out,)
        _, addresses, owners = self._layout(args, outs)
        frame = self._build_frame(args, outs)
        outputs = self._fill(frame, addresses, args, outs)
        frame.keep += [*args, *outputs, *owners]
        return Bound(self, frame, self._returned(outputs, args))

    def report(self, *args: Any, **named: Any) -> Report:
        """What a call costs: launches, binary searches in loops, recomputed expressions, bytes and
        padding; numbers for these arguments, formulas in sizes without any. Raises
        ArgumentError."""
        from tilewright.runtime.report import report

        arguments = None
        if args or named:
            arguments = Arguments(self.manifest, self._dtypes)
            for spec, arg in zip(self.inputs, self._ordered(args, named), strict=True):
                arguments.add_input(spec, arg)
        return report(self.manifest, self.resources, arguments)

    def __reduce__(self) -> tuple[Callable[..., Kernel], Args]:
        return self.rebuilt

    def __repr__(self) -> str:
        args = ", ".join(t.name for t in self.inputs)
        return f"<kernel {self.manifest.name}({args}) for {self.manifest.target}>"

    # -- steps of a call -------------------------------------------------------------------------

    def _layout(self, args: Args, outs: Args) -> tuple[Any, list[int], list[Any]]:
        """A key that calls with equal frames share; the address of each argument (0 for sparse ones
        and numbers); what owns memory for the time of the call."""
        key: list[Any] = []
        addresses: list[int] = []
        owners: list[Any] = []
        if len(outs) > len(self.results):
            self._build_frame(args, outs)  # raises A101
        try:
            for kind, arg in zip(self._kinds, (*args, *outs) if outs else args):  # noqa: B905
                if kind is DENSE and arg is not None:
                    same, pointer, owner = layout(arg)
                    key += (same, pointer & 15)
                    addresses.append(pointer)
                    if owner is not None:
                        owners.append(owner)
                    continue
                addresses.append(0)
                if arg is None:
                    key.append(None)
                elif kind is SPARSE:
                    structure = getattr(arg, "structure", None)  # None is refused by _build_frame
                    key += (id(structure), structure and (arg.dtype.name, arg.fill, arg.inner))
        except ArgumentError:
            self._build_frame(args, outs)  # raises the error with the name of the argument
            raise
        return tuple(key), addresses, owners

    def _build_frame(self, args: Args, outs: Args) -> Frame:
        """Check the arguments and prepare a frame of their layout."""
        arguments = Arguments(self.manifest, self._dtypes)
        for spec, arg in zip(self.inputs, args, strict=True):
            arguments.add_input(spec, arg)
        outs = outs or (None,) * len(self.results)
        if len(outs) != len(self.results):
            text = f"{len(outs)} outputs given, {len(self.results)} expected"
            raise ArgumentError("A101", text, where="out")
        for spec, array in zip(self.results, outs, strict=True):
            arguments.add_output(spec, array)
        for spec in self.temps:
            arguments.add_output(spec, None)
        frame = build_frame(arguments)
        frame.run = self.launcher.prepare(self, frame)
        return frame

    def _fill(self, frame: Frame, addresses: list[int], args: Args, outs: Args) -> list[Any]:
        """Write the addresses and numbers of a call into its frame; the outputs."""
        for slot, n in frame.addresses:
            slot.value = addresses[n]
        for slot, n, part in frame.values:
            slot.value = address(args[n].values[part])
        for n, slots in frame.numbers:
            spec = self.inputs[n]
            value = scalar_value(spec, self._dtypes[spec.name], args[n])
            for slot in slots:
                slot.value = value
        if self.updates or outs:
            self._check_hazards(frame, addresses, args, outs)
        outputs: list[Any] = []
        for n, output in enumerate(frame.outputs):
            array = outs[n] if outs else None
            if array is None:
                array = output.allocate(args[output.like])
            outputs.append(array)
            output.write(array, addresses[len(args) + n] if outs else 0)
        return outputs

    def _check_hazards(self, frame: Frame, addresses: list[int], args: Args, outs: Args) -> None:
        """Refuse outputs that cannot be written, or that overlap another argument."""
        written: list[Span] = []
        read: list[Span] = []
        specs = (*self.inputs, *self.results)
        for spec, arg, pointer in zip(specs, (*args, *outs), addresses, strict=False):
            spans = read if spec.role == "input" else written
            if spec.structure and arg is not None:
                if spec.role == "output" and any(view(v).readonly for v in arg.values):
                    raise ArgumentError("A104", f"values of {spec.name} are read-only", where="out")
                spans += value_spans(spec.name, arg)
            elif arg is not None and (spec.dims or spec.role == "output"):
                low, high = frame.spans[spec.name]
                spans.append((spec.name, pointer + low, pointer + high))
        check_overlaps(written, read)

    def _remember(self, key: Any, frame: Frame) -> list[Frame]:
        """A new list for the idle frames of a layout. The key names structures by `id`: it is
        removed when the first of them dies, before another object can have that number."""
        if len(self._frames) >= FRAMES_KEPT:
            self._frames.clear()
        for reference in frame.structures.values():
            structure = reference()
            if structure is not None:
                weakref.finalize(structure, self._frames.pop, key, None).atexit = False
        return self._frames.setdefault(key, [])

    def _returned(self, outputs: list[Any], args: Args) -> Any:
        if self.updates:
            outputs = [*outputs, *(args[n] for n in self.updates)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _ordered(self, args: Args, named: dict[str, Any]) -> Args:
        """All arguments in the order of the program's parameters. Raises ArgumentError[A101]."""
        try:
            return self._signature.bind(*args, **named).args
        except TypeError as error:
            text = f"{self.manifest.name}{self._signature}: {error}"
            raise ArgumentError("A101", text, where="arguments") from None

    @cached_property
    def _signature(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(t.name, kind) for t in self.inputs])


class Bound:
    """A prepared call with fixed arguments. Calling it returns `outputs`, the arrays it writes."""

    __slots__ = ("_run", "frame", "kernel", "outputs")

    def __init__(self, kernel: Kernel, frame: Frame, outputs: Any) -> None:
        self.kernel, self.frame, self.outputs = kernel, frame, outputs
        self._run = frame.run

    def __call__(self) -> Any:
        """Run on what the arrays hold now; returns `outputs`."""
        self._run()
        return self.outputs

    def boxes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """The address ranges (first, end) of each tensor, by its name. The name "" has those of the
        coordinate arrays of all structures."""
        frame = self.frame
        boxes: dict[str, tuple[tuple[int, int], ...]] = {"": ()}
        for t in self.kernel.manifest.tensors:
            slots = frame.slots.get(t.name, ())
            if t.structure:
                parts = frame.structures[t.structure]().parts  # type: ignore[union-attr]
                size = dtypes.ALL[t.dtype].itemsize
                spans = [(0, parts[n].size * size) for _, n in slots]
                views = [view(a) for p in parts for of in p.arrays for a in of.values()]
                boxes[""] += tuple(map(byte_span, views))
            else:
                spans = [frame.spans[t.name] for _ in slots[:1] if t.name in frame.spans]
            boxes[t.name] = tuple(
                (slot.value + low, slot.value + high)
                for (slot, _), (low, high) in zip(slots, spans, strict=False)
            )
        return boxes

    def __repr__(self) -> str:
        return f"<bound {self.kernel!r}, {sum(self.frame.units)} units>"
