"""The cost of a step: seconds by the tokens it reads, from ten constants that `tune.py` fits. On a
GPU it is that of a step launched ahead, which the GPU does not wait for.

    seconds = step + answer · answers + context · (Σ keys of answers + copied · Σ keys of chunks)
              + over · max(0, rows - knee) + tail · blocks of rows that are left over
            and with prompts  + mixed + prompt · tokens + reads · Σ keys of each token
                              + beside [answers too]

Up to `knee` rows a GPU reads the weights in the time that their products take. Where prompts and
answers are one recorded pass (`is_filled`) it computes more rows than there are: `filled`. A CPU,
whose knee is 0, takes eight rows of prompts or four answers at once; what is left over is blocks of
4, 2 and 1.
Its kernel of several queries copies the keys of a chunk into tiles first, however few queries there
are: such a key counts `COPIED` times. On a GPU it counts once.
The constants are fitted by least squares of the relative error, none below zero.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tilewright
from tilewright.errors import ModelError
from tilewright.runtime import cuda, pool
from tilewright.serve.weights import ModelFile
from tilewright.target import Target
from tilewright.toolchain import compilers

CONSTANTS = ("step", "mixed", "answer", "context", "prompt", "reads", "tail", "beside", "over")
HOW_TO_TUNE = "measure them: tilewright tune serve MODEL --out FILE"
COPIED = 2.5  # times what a key of an answer costs (docs/design/serving-log.md)
SLOWNESS = 64  # steps in which the factors follow a change
BUCKET = 64  # the rows of answers in a recorded step with prompts are a multiple of it


def filled(rows: int) -> int:
    """The rows of a recorded step with prompts that needs `rows`. Tiles of libraries have 128 rows,
    and a number between may be slow: 448 took 17.4 ms, 512 took 13.3 (serving-log.md, *Stairs*)."""
    return rows + -rows % (BUCKET if rows <= 6 * BUCKET else 2 * BUCKET)


class Work(NamedTuple):
    """What a step reads. `answers`: rows of answers, `context`: keys that these read; `prompt`:
    tokens of prompts, `reads`: keys that each reads, `span`: keys that their chunks read."""

    answers: int = 0
    context: int = 0
    prompt: int = 0
    reads: int = 0
    span: int = 0

    def plus(self, start: int, tokens: int) -> "Work":
        """The same with a chunk of a prompt more, from position `start` on."""
        answers, context, prompt, reads, span = self
        reads += tokens * start + tokens * (tokens + 1) // 2
        return Work(answers, context, prompt + tokens, reads, span + start + tokens)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a step; the module describes the constants. `key`: what they were measured on."""

    step: float = 0.0
    mixed: float = 0.0
    answer: float = 0.0
    context: float = 0.0
    prompt: float = 0.0
    reads: float = 0.0
    tail: float = 0.0
    beside: float = 0.0
    over: float = 0.0
    knee: int = 0
    is_filled: int = 0
    factors: tuple[float, float] = (1.0, 1.0)
    key: str = ""

    def seconds(self, work: Work) -> float:
        """The time that a step takes."""
        answers, context, prompt, reads, span = work
        keys = context + span * (1.0 if self.knee else COPIED)
        cost = self.step + self.answer * answers + self.context * keys
        cost += self.tail * ((answers % 4).bit_count() + (prompt % 8).bit_count())
        rows = answers + prompt
        if prompt and self.is_filled:
            rows = filled(rows + -answers % BUCKET)
        cost += self.over * max(0, rows - self.knee)
        if not prompt:
            return cost * self.factors[0]
        cost += self.mixed + self.prompt * prompt + self.reads * reads
        return (cost + self.beside * (answers > 0)) * self.factors[1]

    @property
    def is_fitted(self) -> bool:
        """Whether it has been measured; one that has not takes every step for 0 seconds."""
        return self.seconds(Work(1, 1)) > 0

    def corrected(self, work: Work, seconds: float) -> "CostModel":
        """The model after a step that took `seconds`: one factor follows by 1 / `SLOWNESS` of the
        difference. A step twice as slow as predicted, or slower, counts as twice as slow."""
        if not self.is_fitted:
            return self
        ratio = min(max(seconds / self.seconds(work), 0.5), 2.0)
        change, (answers, prompts) = 1 + (ratio - 1) / SLOWNESS, self.factors
        factors = (answers, prompts * change) if work.prompt else (answers * change, prompts)
        return replace(self, factors=factors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file for `load`; times in seconds. Raises OSError."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: str | None) -> "CostModel":
        """Reads a file of `save`. Raises ModelError[M108] for one that was measured on another
        device, model or version than `key` (None: any), or that is no such file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            factors = values.pop("factors")
            model = cls(factors=(float(factors[0]), float(factors[1])), **values)
            numbers = [values[name] for name in (*CONSTANTS, "knee", "is_filled")]
            numbers += model.factors
            least = [model.seconds(work) for work in (Work(1, 1), Work().plus(0, 1))]
            if not all(np.isfinite(numbers)) or min(numbers) < 0 or min(least) == 0:
                raise ValueError("a constant is negative or no number, or a step takes no time")
        except Exception as error:  # a file may hold anything
            raise _refused(path, f"is no file of measured costs: {error}") from None
        if key is not None and model.key != key:
            raise _refused(path, f"was measured on {str(model.key)[:200]!r}, this is {key!r}")
        return model


def cost_key(file: ModelFile, target: Target, invariant: bool, products: str) -> str:
    """What a fitted cost holds for: device, weights, version, and how rows are computed."""
    weights = f"{file.path.name} of {file.nbytes} bytes on {target}"
    kind = f"{'invariant' if invariant else 'fast'}; products by {products}"
    return f"{device_name(target)}; {weights}; {kind}; tilewright {tilewright.__version__}"


def device_name(target: Target) -> str:
    """The GPU, or the processor and the cores that this process uses."""
    if target.is_cuda:
        return cuda.device(cuda.current_device()).name if cuda.available() else str(target)
    name = compilers.cpu_field(b"model name") or platform.machine()
    return f"{name}, {pool.wanted_threads()} threads"


def _refused(path: str | os.PathLike[str], rule: str) -> ModelError:
    return ModelError("M108", f"{path} {rule}", where="cost", hint=HOW_TO_TUNE)
