"""Writes the page of `tilewright show --html`: every stage beside the one before it.

The page is one file with its style and script. Lines that a pass changed are marked on both sides.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.tools.show import Stage

GENERATED = ("C++", "CUDA", "refused")

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2733; --quiet: #5b6b7c; --line: #d8dee6;
  --panel: #f6f8fa; --new: #d9f2df; --old: #fbe0dd; --accent: #0b62a8; }
@media (prefers-color-scheme: dark) { :root { --back: #14181d; --text: #dde4ec; --quiet: #93a1b1;
  --line: #2e3742; --panel: #1b2128; --new: #17402a; --old: #4a2326; --accent: #6db3f2; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  display: grid; grid-template-columns: 17rem minmax(0, 1fr); }
nav { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1rem;
  border-right: 1px solid var(--line); background: var(--panel); font-size: 13px; }
nav a { display: block; color: inherit; text-decoration: none; padding: .1rem 0;
  overflow-wrap: anywhere }
nav a:hover, nav a:focus { color: var(--accent); text-decoration: underline }
nav small, summary small { color: var(--quiet) }
main { padding: 1rem 1.5rem; min-width: 0 }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin: 1.5rem 0 .5rem }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; overflow: hidden }
summary { cursor: pointer; padding: .4rem .8rem; background: var(--panel); font-weight: 600 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font: 12.5px/1.45 ui-monospace, monospace }
td { vertical-align: top; white-space: pre; padding: 0 .6rem; width: 50% }
td + td { border-left: 1px solid var(--line) }
td.new { background: var(--new) } td.old { background: var(--old) }
td.gap { color: var(--quiet); font-style: italic }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; font: 12.5px/1.45 ui-monospace, monospace }
button { font: inherit; font-size: 13px; margin-right: .5rem }
@media (max-width: 60rem) { body { display: block } nav { position: static; height: auto } }
"""

_SCRIPT = """
function all(open) { document.querySelectorAll("details").forEach(d => d.open = open) }
function reveal() {
  const d = document.getElementById(location.hash.slice(1));
  if (d) d.open = true;
}
addEventListener("hashchange", reveal); reveal();
"""


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
                inner = _beside(before, stage.text)
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


def _beside(old: str, new: str) -> str:
    rows = "".join(_rows(old.splitlines(), new.splitlines()))
    return f'<div class="scroll"><table>{rows}</table></div>'


def _rows(old: list[str], new: list[str]) -> Iterator[str]:
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for k in range(max(b - a, d - c)):
            left = old[a + k] if a + k < b else ""
            right = new[c + k] if c + k < d else ""
            old_class = ' class="old"' if kind != "equal" and a + k < b else ""
            new_class = ' class="new"' if kind != "equal" and c + k < d else ""
            cells = f"<td{old_class}>{escape(left)}</td><td{new_class}>{escape(right)}</td>"
            yield f"<tr>{cells}</tr>"
