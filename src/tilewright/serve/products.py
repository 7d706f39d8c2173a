"""Products of many rows by torch, which is cuBLAS on a GPU: they share memory with our kernels, and
a recorded step captures them among its own launches. torch is optional."""

from contextlib import suppress
from functools import partial
from typing import Any

from tilewright.runtime.view import byte_span, view
from tilewright.serve.weights import ModelFile
from tilewright.target import Target

OWN_ROWS = 16  # up to so many rows our own layers keep the bits of each


def products_of(file: ModelFile, target: Target) -> "Products | None":
    """What computes products of many rows: None for our own layers, where torch has no GPU. In
    bfloat16, and in float32 where all weights are."""
    kinds = {w.kind for w in file.tensors.values() if len(w.shape) == 2}
    if target.is_cuda:
        with suppress(ImportError, OSError):  # OSError: its own libraries are absent
            import torch

            # Products of older ones have no `out_dtype`.
            if torch.__version__ >= "2.9" and torch.cuda.is_available():
                return Products("cuda:0", "float32" if kinds == {"f32"} else "bfloat16")
    return None


class Products:
    """Linear layers of torch on a device, whose weights and inputs are of one dtype. It is called
    and bound as a kernel is: `(x, w, *bias, out=y)` computes y = x wᵀ + bias."""

    def __init__(self, device: str, dtype: str) -> None:
        import torch

        self.torch, self.device, self.dtype = torch, device, dtype
        self.name = f"torch {torch.__version__}"
        # On which steps are captured: torch keeps the memory that cuBLAS needs for each stream.
        self.stream = None if device == "cpu" else torch.cuda.Stream(device)
        self._known: set[Any] = set()  # shapes of products that torch has computed

    def empty(self, rows: int, width: int, dtype: str) -> Any:
        return self.torch.zeros(rows, width, dtype=getattr(self.torch, dtype), device=self.device)

    def tensor(self, array: Any) -> Any:
        """An array as a tensor, the same memory; integers of 16 bits are bfloat16."""
        tensor = self.torch.as_tensor(array, device=self.device)
        return tensor if tensor.dtype.is_floating_point else tensor.view(self.torch.bfloat16)

    def __call__(self, *args: Any, out: Any) -> None:
        Product(self, args, out)()

    def bind(self, *args: Any, out: Any) -> "Product":
        """A product for a recorded step. What torch makes at the first of a shape is made now,
        which writes `out`."""
        product, kinds = Product(self, args, out), [(a.shape, str(a.dtype)) for a in (*args, out)]
        if self.stream and (shape := tuple(kinds)) not in self._known:
            self.torch.cuda.synchronize(self.device)  # a step under way reads what this writes
            product.run(0)
            self.torch.cuda.synchronize(self.device)
            self._known.add(shape)
        return product


class Product:
    """One product with its memory fixed: on a GPU the launch of a step, captured on `stream`."""

    def __init__(self, of: Products, args: tuple[Any, ...], out: Any) -> None:
        (x, w, *bias), y = map(of.tensor, args), of.tensor(out)
        kind = {} if y.dtype == x.dtype else {"out_dtype": y.dtype}
        call, added = of.torch.addmm if bias else of.torch.mm, [b.to(x.dtype) for b in bias]
        self._call = partial(call, *added, x, w.T, out=y, **kind)
        self.boxes = tuple(byte_span(view(a)) for a in args), (byte_span(view(out)),)
        self.of, self.launch = of, self if of.stream else None
        self.stream = of.stream.cuda_stream if of.stream else 0

    def __call__(self) -> None:
        self._call()

    def run(self, _: int) -> None:
        with self.of.torch.cuda.stream(self.of.stream):
            self._call()
