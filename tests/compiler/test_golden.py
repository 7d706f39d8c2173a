"""The text of every shipped kernel, as golden files: a change of the compiler shows what it
changes. `pytest tests/compiler/test_golden.py --update-golden` writes them anew.

A file holds a kernel's loops after its schedule and the code generated from them, for each target
it ships for. What is the same for all kernels is left out, as are the shells of bodies, of which
`test_shells_have_their_golden_text` keeps one.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.conftest import GOLDEN
from tests.shipped import ATTENTION, SHIPPED

from tilewright import compiler
from tilewright.attention.families import cpu, decode, portable
from tilewright.attention.spec import expanded, template
from tilewright.codegen import prelude_files, shell
from tilewright.target import target
from tilewright.toolchain import compilers

FOLDER = "kernels"
VECTOR_BITS = 512  # of the CPU's vectors, on every machine


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "cpu_lanes", lambda: VECTOR_BITS // 32)


def file_of(name: str) -> str:
    return f"{FOLDER}/{name.replace(' ', '-')}.txt"


def without_constants(source: str) -> str:
    """Generated code with each file that it holds named instead, and without the checks that the C
    structs are laid out as Python says: the same for all kernels."""
    for name in ("cpu.h", "mma_cpu.h", "lists.h", "rows.h"):
        source = source.replace(prelude_files.prelude(name), f'#include "{name}"\n')
    source = re.sub(r"\n#ifndef TW_OFFSET\n.*?\n#endif\n#endif\n", "\n", source, flags=re.DOTALL)
    return re.sub(r"static_assert\(TW_OFFSET.*\n", "", source)


def kernel_text(name: str) -> str:
    """The scheduled loops and the generated code for each target."""
    shipped, parts = SHIPPED[name], []
    for kind in shipped.targets:
        made_for = target(kind)
        scheduled = shipped.definition.scheduled(made_for).lowered.program
        lowered = shipped.definition.lower(made_for)
        built = compiler.rendered(lowered, made_for)
        source = without_constants(f"\n{built.bodies[0].text}" if built.bodies else built.source)
        source = source.lstrip("\n")
        parts += [f"==== {kind}: scheduled", str(scheduled), f"==== {kind}: generated", source]
        parts += [
            f"{b.entry}: {b.threads} threads, {b.smem_bytes} bytes shared, {' '.join(b.headers)}, "
            f"{' '.join(b.reads)} -> {' '.join(b.writes)}"
            for b in built.bodies
        ]
    return "\n".join(parts).rstrip() + "\n"


def attention_text(name: str) -> str:
    """What is rendered for a variant, for both targets; the skeletons are files of their own."""
    spec = ATTENTION[name]
    cpp = without_constants(cpu.source(spec, VECTOR_BITS))
    for file in ("bounds.h", "table.h", "variant.h", "vectors_cpu.h", "flash_cpu.h"):
        cpp = cpp.replace(template(file), f'#include "{file}"\n')
    bodies = {"cuda": portable.body(spec)}
    if spec.q == spec.kv and spec.kv.bits == 16 and spec.head_dim <= 128:
        bodies["cuda, decode"] = decode.body(spec, 8, 1)
    text = f"==== cpp\n{cpp.rstrip()}\n"
    for kind, body in bodies.items():
        cuda = body.text
        for file in ("bounds.h", "table.h", "variant.h", "flash_portable.cuh", "decode.cuh"):
            cuda = cuda.replace(expanded(file), f'#include "{file}"')
        numbers = (
            f"{body.threads} threads, {body.resident} of an SM, {body.smem_bytes} bytes shared"
        )
        text += f"==== {kind}: {numbers}, {' '.join((*body.headers, *body.order))}\n"
        text += f"{without_constants(cuda).rstrip()}\n"
    return text


# Those of q4_1 have the same statements and a minimum more; for many rows q8_0 is another weight in
# the loops of q4_1.
REDUNDANT = {f"linear q4_0{kind}" for kind in (" many", " interleaved", " interleaved many")}
REDUNDANT |= {"linear q8_0 interleaved many"}
PRINTED = [name for name in SHIPPED if name not in REDUNDANT]


@pytest.mark.parametrize("name", PRINTED)
def test_a_kernel_has_its_golden_text(name, golden):
    golden(file_of(name), kernel_text(name))


def test_shells_have_their_golden_text(golden):
    """A kernel alone, and beside others in a step: the same body twice, one of fewer threads."""
    bodies = {
        name: replace(compiler.rendered(SHIPPED[name].definition.lower("cuda"), target("cuda"))
                      .bodies[0], text=f"// the body of {name}")
        for name in ("linear f32", "append")
    }  # fmt: skip
    linear, append = bodies.values()
    texts = shell.alone([linear], ["stage0"]), shell.beside([linear, append, linear])
    golden("shells.txt", "\n====\n".join(texts) + "\n")


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_kernel_has_its_golden_text(name, golden):
    golden(file_of(f"attention {name}"), attention_text(name))


def test_every_golden_text_belongs_to_a_kernel(request):
    names = [*PRINTED, *(f"attention {name}" for name in ATTENTION)]
    wanted = {GOLDEN / file_of(name) for name in names}
    found = set((GOLDEN / FOLDER).iterdir())
    if request.config.getoption("update_golden"):
        for stale in found - wanted:
            stale.unlink()
        return
    assert found == wanted
    # A change has to be read in review: texts are short.
    size = sum(path.stat().st_size for path in found)
    assert size / len(found) < 13_000 and size < 1_150_000
