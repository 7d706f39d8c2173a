"""Kernels of recorded steps: bodies of several programs in one translation unit, for each
architecture, and what their loads are."""

from __future__ import annotations

import re

import pytest
from tests.cubin.test_ops import ARCHS
from tests.shipped import SHIPPED

from tilewright.codegen import prelude_files, shell
from tilewright.ir.body import Body
from tilewright.toolchain import nvrtc

pytestmark = pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")

GROUPS = (  # as a decode step has them, and bodies of unlike threads and headers
    ("linear q4_1", "linear q4_1", "linear f16"),
    ("rope halves", "append halves", "append"),
    ("embedding q8_0", "positions"),
    ("linear q4_1 norm_gate",),
    ("gemm f16", "append", "bsr_spmm 16 f16 64"),
    ("argmax", "spmm by_length f32 128", "positions"),
)


def bodies(names: tuple[str, ...], arch: str) -> tuple[Body, ...]:
    kernels = (SHIPPED[name].definition.build(f"cuda:{arch}") for name in names)
    return tuple(body for kernel in kernels for body in kernel.launcher.bodies)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_bodies_beside_each_other_compile(names: tuple[str, ...], arch: str):
    source = f"#define {shell.OVERLAPS}\n{shell.beside(bodies(names, arch))}"
    headers = prelude_files.headers()
    found = nvrtc.compile_cuda(source, arch=arch, name="step", headers=headers).resources["step"]
    assert found.spill_bytes == 0


def ptx(monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """What NVRTC makes of a source for sm_90 before ptxas."""
    read = nvrtc._read
    monkeypatch.setattr(nvrtc, "_read", lambda p, name: read(p, name.replace("CUBIN", "PTX")))
    options = ("--gpu-architecture=compute_90", *nvrtc.FLAGS)
    status, log, text = nvrtc._compile(source, prelude_files.headers(), options)
    assert not status, log
    return text.decode()


def test_loads_by_the_kind_of_a_buffer(monkeypatch: pytest.MonkeyPatch):
    """A launch that overlaps the one in front reads weights alone through the read-only path, and
    nothing before it waits. One that does not overlap reads all of its inputs through that path."""
    linear, append = (bodies((name,), "sm_90a") for name in ("linear f32", "append"))
    alone = ptx(monkeypatch, shell.alone(append, ["stage0"]))
    assert len(re.findall(r"ld\.global\.nc", alone)) == len(re.findall(r"ld\.global", alone)) > 0
    assert "griddepcontrol" not in alone
    define = f"#define {shell.OVERLAPS}\n"
    overlapping = ptx(monkeypatch, define + shell.beside(append))
    assert "ld.global." in overlapping and "ld.global.nc" not in overlapping
    text = ptx(monkeypatch, define + shell.beside(linear))
    before, wait, after = text.partition("griddepcontrol.wait")
    assert wait and "griddepcontrol.launch_dependents" not in before
    assert "ld.global" not in before and "griddepcontrol.launch_dependents" in after
    assert "ld.global.nc" in after and re.search(r"ld\.global\.(v4\.)?[fu]32", after)
