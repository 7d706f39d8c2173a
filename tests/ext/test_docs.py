"""The blocks of Python on the pages of docs/ are run, page by page, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tilewright.errors import MissingExtra
from tilewright.toolchain import compilers

FOLDER = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*FOLDER.glob("*.md"), *FOLDER.glob("attention/*.md")])
pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def has_gpu_blocks(page: Path) -> bool:
    return "torch.cuda.is_available()" in page.read_text(encoding="utf-8")


def run(page: Path) -> dict:
    """Runs the blocks of a page, one after the other, in the namespace that it returns."""
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    names: dict = {"__name__": page.stem}
    for block in blocks:
        first = text[: block.start(1)].count("\n")
        exec(compile("\n" * first + block[1], str(page), "exec"), names)
    return names


def test_there_is_a_page():
    """One for the language, for serving, for each noun of the attention engine, and for those who
    come from FlashInfer."""
    names = {page.stem for page in PAGES}
    assert names >= {"language", "serving", "coming-from-flashinfer"}
    assert names >= {"variant", "table", "pool", "plan"}
    assert names >= {"attention", "workspace", "state", "select"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page, request):
    """The pages about the language and serving compile their programs; those about attention are
    evaluated."""
    if page.stem == "serving":
        try:
            from tilewright.serve.weights import packaged_model

            packaged_model()
        except MissingExtra as missing:
            pytest.skip(f"no model: {missing.hint}")
    elif page.stem != "language":
        pytest.importorskip("torch")
        request.getfixturevalue("interpreted")
    run(page)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [*filter(has_gpu_blocks, PAGES)], ids=lambda p: p.name)
def test_blocks_for_gpus_run(page):
    torch = pytest.importorskip("torch")
    names = run(page)
    torch.cuda.synchronize()  # a replay that fails says so here, with its arrays alive
    assert names
