"""Products of many rows by torch, which is cuBLAS on a GPU: activations, weights and results share
memory with our kernels, and a recorded step captures the products among its own launches.

torch is optional: without it our own linear layers take any number of rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tilewright.ops.linear import STORED
from tilewright.runtime.view import byte_span, view
from tilewright.serve.weights import ModelFile
from tilewright.target import Target

OWN_ROWS = 16  # up to so many rows our own layers keep the bits of each; also the faster for one


def products_of(file: ModelFile, target: Target) -> Products | None:
    """What computes the products of many rows: None for our own linear layers, where torch has no
    GPU, weights are quantised, or results are normalised before they are added."""
    kinds = {w.kind for w in file.tensors.values() if len(w.shape) == 2}
    usable = len(kinds) == 1 and kinds <= {"f32", "bf16"} and not file.config.post_norms
    if not (usable and target.is_cuda and importlib.util.find_spec("torch")):
        return None
    import torch

    return Products("cuda", STORED[kinds.pop()]) if torch.cuda.is_available() else None


class Products:
    """Linear layers of torch on a device, whose weights and activations are of one dtype. It is
    called and bound as a kernel is: `(x, w, *bias, out=y)` computes y = x wᵀ + bias."""

    def __init__(self, device: str, dtype: str) -> None:
        import torch

        self.torch, self.device, self.dtype = torch, device, dtype
        self._known: set[Any] = set()  # products that torch was asked for before

    def __repr__(self) -> str:
        return f"torch {self.torch.__version__} above {OWN_ROWS} rows"

    @cached_property
    def stream(self) -> Any:
        """The stream on which steps are captured: torch keeps the memory that cuBLAS needs for
        each stream, so all steps have one."""
        return self.torch.cuda.Stream()

    def empty(self, rows: int, width: int, dtype: str) -> Any:
        kind = getattr(self.torch, dtype)
        return self.torch.zeros(rows, width, dtype=kind, device=self.device)

    def tensor(self, array: Any) -> Any:
        """An array as a tensor, the same memory; integers of 16 bits are bfloat16."""
        made = self.torch.as_tensor(array, device=self.device)
        return made if made.dtype.is_floating_point else made.view(self.torch.bfloat16)

    def joined(self, arrays: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """One array of the rows of several, and these as parts of it."""
        tensors = [self.tensor(a) for a in arrays]
        whole = self.torch.cat(tensors)
        return whole, whole.split([len(t) for t in tensors])

    def __call__(self, *args: Any, out: Any) -> None:
        Product(self, args, out)()

    def bind(self, *args: Any, out: Any) -> Product:
        """A product for a recorded step. What torch makes at the first of a shape is made now,
        which writes `out`: a capture has no room for it."""
        made, cuda = Product(self, args, out), self.torch.cuda
        shape = (*(x.shape for x in args), out.dtype)
        if self.device != "cpu" and shape not in self._known:
            self._known.add(shape)
            cuda.synchronize()  # a step under way reads what this writes
            made.run(0)
            cuda.synchronize()
        return made


class Product:
    """One product with its memory fixed; on a GPU it is the launch of a recorded step, which is
    captured on `stream`."""

    name = "product"

    def __init__(self, of: Products, args: tuple[Any, ...], out: Any) -> None:
        torch, (x, w, *bias) = of.torch, map(of.tensor, args)
        self.of, self.out = of, of.tensor(out)
        wider = {} if self.out.dtype == x.dtype else {"out_dtype": self.out.dtype}
        if bias:
            added = bias[0].to(x.dtype)
            self._run = lambda: torch.addmm(added, x, w.T, out=self.out)
        else:
            self._run = lambda: torch.mm(x, w.T, out=self.out, **wider)
        self.boxes = tuple(byte_span(view(a)) for a in args), (byte_span(view(out)),)
        self.launch = None if of.device == "cpu" else self

    @property
    def stream(self) -> int:
        return self.of.stream.cuda_stream

    def __call__(self) -> None:
        self._run()

    def run(self, _stream: int) -> None:
        with self.of.torch.cuda.stream(self.of.stream):
            self._run()
