"""The blocks of Python on the pages of docs/ are run, page by page, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tilewright.toolchain import compilers

FOLDER = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted([*FOLDER.glob("*.md"), *FOLDER.glob("attention/*.md")])
pytestmark = pytest.mark.skipif(not compilers.has_compiler(), reason="no C++ compiler")


def test_there_is_a_page():
    """One for the language and each noun of the attention engine, and the one for those who come
    from FlashInfer."""
    names = {page.stem for page in PAGES}
    assert names >= {"language", "coming-from-flashinfer", "variant", "table", "pool", "plan"}
    assert names >= {"attention", "workspace", "state", "select"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page, request):
    """The page about the language compiles its programs; those about attention are evaluated."""
    if page.stem != "language":
        pytest.importorskip("torch")
        request.getfixturevalue("interpreted")
    text = page.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    names: dict = {"__name__": page.stem}
    for block in blocks:
        first = text[: block.start(1)].count("\n")
        exec(compile("\n" * first + block[1], str(page), "exec"), names)
