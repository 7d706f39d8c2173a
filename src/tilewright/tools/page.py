"""Writes the page of `tilewright show --html`: every stage beside the one before it.

The page is one file with its style and script. Lines that a pass changed are marked on both sides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.tools.show import Stage

GENERATED = ("C++", "CUDA", "refused")

_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def html(title: str, programs: dict[str, list[Stage]]) -> str:
    """The page for the stages of each program."""
    menu, body, number = [], [], 0
    for name, stages in programs.items():
        menu.append(f"<h2>{escape(name)}</h2>")
        body.append(f"<h2>{escape(name)}</h2>")
        before = None
        for stage in stages:
            number += 1
            head = f"{escape(stage.title)} <small>{escape(stage.level)}</small>"
            menu.append(f'<a href="#s{number}">{head}</a>')
            if before is None or stage.level in GENERATED:
                inner = f"<pre>{escape(stage.text)}</pre>"
            else:
                rows = "".join(_rows(before.splitlines(), stage.text.splitlines()))
                inner = f'<div class="scroll"><table>{rows}</table></div>'
            body.append(f'<details id="s{number}" open><summary>{head}</summary>{inner}</details>')
            if stage.level not in GENERATED:
                before = stage.text
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: stages</title><style>{_STYLE}</style></head>\n"
        f'<body><nav aria-label="stages">{"".join(menu)}</nav>\n<main><h1>{escape(title)}</h1>'
        "<p>Each stage on the right, the one before it on the left; changed lines are marked.</p>"
        '<p><button onclick="all(true)">open all</button>'
        '<button onclick="all(false)">close all</button></p>\n'
        f"{chr(10).join(body)}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _rows(old: list[str], new: list[str]) -> Iterator[str]:
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for k in range(max(b - a, d - c)):
            left = old[a + k] if a + k < b else ""
            right = new[c + k] if c + k < d else ""
            old_class = ' class="old"' if kind != "equal" and a + k < b else ""
            new_class = ' class="new"' if kind != "equal" and c + k < d else ""
            cells = f"<td{old_class}>{escape(left)}</td><td{new_class}>{escape(right)}</td>"
            yield f"<tr>{cells}</tr>"
