"""`tilewright show FILE [NAME] --stages`: a program at every level, then the generated text.

The file is executed as by Python, its output goes to standard error: show only files that you would
run. Its programs are the `Definition`s among its globals.
"""

import argparse
import contextlib
import difflib
import runpy
import sys
from collections.abc import Iterator
from html import escape
from itertools import zip_longest
from pathlib import Path
from string import Template
from traceback import extract_tb
from typing import NamedTuple

from tilewright import compiler
from tilewright.build import Definition
from tilewright.codegen import prelude_files
from tilewright.errors import ProgramError, TilewrightError
from tilewright.ir.nodes import Program
from tilewright.lower import AFTER_SCHEDULE, BEFORE_SCHEDULE, run_passes
from tilewright.schedule import Schedule
from tilewright.target import Target
from tilewright.target import target as parse_target
from tilewright.tools.cli import check_output

DEFAULT_TARGETS = ("cpp", "cuda:sm_90a")
GENERATED = ("C++", "CUDA", "refused")


class Stage(NamedTuple):
    """The program after the verb or pass of `title`. `level` is coordinates, positions or loops, or
    the language of generated text."""

    title: str
    level: str
    text: str


def show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a Python file; it is executed")
    parser.add_argument("name", nargs="?", help="one program of it (default: all)")
    parser.add_argument(
        "--stages", action="store_true", help="every verb and pass that changed something"
    )
    parser.add_argument(
        "--target", action="append", metavar="T",
        help=f"cpp or cuda:sm_90a, also several times (default: {' and '.join(DEFAULT_TARGETS)})",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write one self-contained page instead"
    )


def show(args: argparse.Namespace) -> int:
    """Print or write the stages of each program of a file. Raises ProgramError[P101],
    ArgumentError[A109] where the page cannot be written."""
    if args.html:
        check_output("--html", args.html)
    targets = [parse_target(t) for t in args.target or DEFAULT_TARGETS]
    definitions = load(args.file)
    if args.name:
        if args.name not in definitions:
            hint = f"programs: {', '.join(definitions)}"
            raise ProgramError("P101", f"no program {args.name!r}", where=str(args.file), hint=hint)
        definitions = {args.name: definitions[args.name]}
    shown = {name: stages_of(d, targets) for name, d in definitions.items()}
    if not args.stages and not args.html:
        shown = {  # the program as written, and the generated texts
            name: [s for s in stages if s.title == "as written" or s.level in GENERATED]
            for name, stages in shown.items()
        }
    if args.html:
        args.html.write_text(html(args.file.name, shown), encoding="utf-8")
        print(f"wrote {args.html}")
        return 0
    for name, stages in shown.items():
        print(f"==== {name}")
        for stage in stages:
            print(f"\n---- {stage.title}   ({stage.level})\n{stage.text}")
        print()
    return 0


def load(path: Path) -> dict[str, Definition]:
    """Run a file and return its programs by name. Raises ProgramError[P101] without any."""
    if not path.is_file():
        rule = "this is no file" if path.exists() else "no such file"
        raise ProgramError("P101", rule, where=str(path))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            names = runpy.run_path(str(path))
        except TilewrightError:
            raise
        except (Exception, SystemExit) as error:
            rule = f"running it failed: {type(error).__name__}: {error}"
            lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == str(path)]
            where = f"{path}:{lines[-1]}" if lines else str(path)
            raise ProgramError("P101", rule, where=where) from error
    definitions: dict[str, Definition] = {}
    for name, value in names.items():
        if isinstance(value, Definition) and not any(value is d for d in definitions.values()):
            definitions[name] = value
    if not definitions:
        hint = "@tw.program above a function"
        raise ProgramError("P101", "the file defines no program", where=str(path), hint=hint)
    return definitions


def stages_of(definition: Definition, targets: list[Target]) -> list[Stage]:
    """All stages for each target in turn, without those that an earlier target shares.

    A target that the schedule does not fit gives one stage with the reason."""
    stages: list[Stage] = []
    for target in targets:
        try:
            own = list(_stages(definition, target))
        except TilewrightError as error:
            own = [Stage(f"not for {target}", "refused", f"{type(error).__name__}{error}")]
        known = {(s.title, s.text) for s in stages}
        stages += [s for s in own if (s.title, s.text) not in known]
    return stages


def _stages(definition: Definition, target: Target) -> Iterator[Stage]:
    """The program as written, after each verb, after each pass with effect; the generated text."""
    last, previous = definition.program, ""
    for last, title in _steps(definition, target):
        if str(last) != previous or title.startswith("schedule "):
            yield Stage(title, last.level, str(last))
        previous = str(last)
    if target.kind == "interp":
        return
    language = "CUDA" if target.is_cuda else "C++"
    yield Stage(f"{language} for {target}", language, source_text(last, target))


def _steps(definition: Definition, target: Target) -> Iterator[tuple[Program, str]]:
    """Yields the program and a title, for the program as written, each verb and each pass."""
    states: list[Schedule] = []
    schedule: Schedule | None = definition.scheduled(target)
    while schedule is not None:
        states.insert(0, schedule)
        schedule = schedule.before
    program = states[0].program
    yield program, "as written"
    for level, passes in (("coordinates", BEFORE_SCHEDULE), ("positions", AFTER_SCHEDULE)):
        for state in states[1:]:
            if state.program.level == level:
                program = state.program
                yield program, f"schedule {state.history[-1]}"
        results: list[tuple[Program, str]] = []
        program = run_passes(
            program, passes, target.kind, lambda name, p, r=results: r.append((p, name))
        )
        yield from results


def source_text(program: Program, target: Target) -> str:
    """The text generated for a program at the loop level, without the prelude."""
    text = compiler.rendered(program, target).source
    for name in ("cpu.h", "mma_cpu.h", "lists.h", "rows.h"):
        prelude = prelude_files.prelude(name)
        text = text.replace(prelude, f"// … prelude/{name}, {len(prelude.splitlines())} lines …\n")
    return text.strip()


def html(title: str, programs: dict[str, list[Stage]]) -> str:
    """The page for the stages of each program: one file with its style and script. Every stage
    is beside the one before it; lines that a pass changed are marked on both sides."""
    files = (Path(__file__).with_name(name) for name in ("page.html", "page.css", "page.js"))
    page, style, script = (file.read_text(encoding="utf-8") for file in files)
    menu: list[str] = []
    body: list[str] = []
    for name, stages in programs.items():
        menu.append(f"<h2>{escape(name)}</h2>")
        body.append(menu[-1])
        before = None
        for number, stage in enumerate(stages, len(menu)):
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
    parts = {"style": style, "script": script, "menu": "".join(menu), "body": "\n".join(body)}
    return Template(page).substitute(parts, title=escape(title))


def _rows(old: list[str], new: list[str]) -> Iterator[str]:
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for pair in zip_longest(old[a:b], new[c:d]):
            cells = ""
            for side, line in zip(("old", "new"), pair, strict=True):
                mark = f' class="{side}"' if kind != "equal" and line is not None else ""
                cells += f"<td{mark}>{escape(line or '')}</td>"
            yield f"<tr>{cells}</tr>"
