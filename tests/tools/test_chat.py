"""`tilewright demo` and `tilewright chat`: answers, history, Ctrl-C, and how they end."""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")

from tilewright.errors import MissingExtra, ModelError
from tilewright.serve.request import Request
from tilewright.serve.weights import packaged_model
from tilewright.tools import chat as tool
from tilewright.tools import cli

COMMAND = [sys.executable, "-m", "tilewright"]
PATIENCE_S = 300  # on a machine that is busy with other work


@pytest.fixture(scope="module")
def smollm() -> Path:
    try:
        return packaged_model()
    except MissingExtra as missing:
        pytest.skip(f"SmolLM2 is not installed: {missing.hint}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    return runnable().write(tmp_path_factory.mktemp("models") / "runnable.gguf")


def run(*arguments: str | Path, typed: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, input=typed, capture_output=True, encoding="utf-8",
        timeout=PATIENCE_S, check=False, env=os.environ | more,
    )  # fmt: skip


# ---------------------------------------------------------------------------- demo


@pytest.mark.slow
def test_demo(smollm: Path):
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "> What is the capital of France?" in done.stdout
    assert "The capital of France is Paris." in done.stdout
    for row in ("model", "kernels", "products", "first token", "prompt", "answer", "memory"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), row
    assert done.stderr == ""


def test_demo_of_another_model(tiny: Path):
    done = run("demo", "the time", "--model", tiny, "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert tiny.name in done.stdout and "> the time" in done.stdout
    assert "5 tokens" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("chat", "no-such-file.gguf"), "ModelError[M101]"),
        (("demo", "--model", "no-such-file.gguf"), "ModelError[M101]"),
        (("chat", os.devnull), "ModelError[M101]"),
        (("chat", "MODEL", "--target", "tpu"), "BuildError[B103]"),
        (("chat", "MODEL", "--context", "0"), "ModelError[M105]"),
        (("demo", "--model", "MODEL", "--max-tokens", "0"), "ModelError[M106]"),
        (("demo", "--model", "MODEL", "--temperature", "-1"), "ModelError[M106]"),
        (("demo", "--model", "MODEL", "--seed", "-1", "--temperature", "1"), "ModelError[M106]"),
        (("demo", "the " * 400, "--model", "MODEL"), "ModelError[M105]"),
        (("chat", "MODEL", "--max-tokens", "-1"), "ModelError[M106]"),
        (("chat", "MODEL", "--temperature", "nan"), "ModelError[M106]"),
        (("chat", "MODEL", "--target", "interp:x"), "BuildError[B103]"),
    ],
)
def test_errors_are_coded(
    tiny: Path, arguments: tuple[str, ...], code: str, capsys: pytest.CaptureFixture[str]
):
    """In this process: the tests below start some of their own."""
    assert cli.main([str(tiny) if a == "MODEL" else a for a in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(code) and "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("knob", "value"), [("ISA", "mmx"), ("THREADS", "many"), ("CACHE_DIR", "~no-such-user/x")]
)
def test_a_bad_knob_ends_a_demo_before_it_prints(tiny: Path, knob: str, value: str):
    done = run("demo", "the thing", "--model", tiny, **{f"TILEWRIGHT_{knob}": value})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("KnobError[K101]") and "Traceback" not in done.stderr


def test_without_a_compiler_it_is_said(tiny: Path):
    """In the first line, and in the one warning."""
    without = {"PATH": "", "CXX": "", "TILEWRIGHT_CXX": "", "PYTHONWARNINGS": "always"}
    done = run("demo", "the", "--model", tiny, "--max-tokens", "3", **without)
    assert done.returncode == 0, done.stderr
    assert "on cpp, interpreted" in done.stdout.splitlines()[0]
    assert done.stderr.count("Warning") == done.stderr.count("no C++ compiler was found") == 1


def test_a_full_disk(tiny: Path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    for arguments in (("demo", "the", "--model", str(tiny), "--max-tokens", "3"), ("--version",)):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, encoding="utf-8",
                timeout=PATIENCE_S, check=False,
            )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == "tilewright: [Errno 28] No space left on device\n"


def test_text_that_the_terminal_does_not_have(tiny: Path):
    """What is typed is not UTF-8; what is said is not Latin-1."""
    done = subprocess.run(
        [*COMMAND, "chat", str(tiny), "--max-tokens", "3"], input=b"the \xff\xfe thing\n/exit\n",
        capture_output=True, timeout=PATIENCE_S, check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b"" and b"3 written" in done.stdout
    done = run("demo", "the Ω", "--model", tiny, "--max-tokens", "3", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stderr == "", done.stderr


# ---------------------------------------------------------------------------- chat


@pytest.mark.parametrize("typed", ["/exit\n", "/quit\n", "", "\n\n/exit\n"])
def test_ways_to_leave(tiny: Path, typed: str):
    done = run("chat", tiny, typed=typed)
    assert done.returncode == 0 and done.stderr == ""
    assert "/exit leaves" in done.stdout


def test_a_question_too_long_does_not_end_the_chat(tiny: Path):
    done = run("chat", tiny, "--max-tokens", "5", typed="the " * 400 + "\nthe\n/exit\n")
    assert done.returncode == 0
    assert done.stderr.startswith("ModelError[M105]")
    assert "5 written" in done.stdout


@pytest.mark.slow
def test_chat_keeps_its_history(smollm: Path):
    asked = "What is the capital of France?\nAnd of Italy?\n/new\nAnd of Spain?\n"
    done = run("chat", smollm, "--max-tokens", "30", typed=asked)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout and "Rome" in done.stdout
    cached = [int(line.split()[2]) for line in done.stdout.splitlines() if " cached tokens" in line]
    assert len(cached) == 3 and cached[1] > cached[2] > cached[0] == 0  # the system text is cached


class FakeLLM:
    """Notes what it is asked; answers with a number, an error or an interrupt."""

    template = object()
    model = SimpleNamespace(file=SimpleNamespace(path="fake.gguf"))

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.latest = Request(0, [1])

    def too_many(self, messages: list[dict[str, str]]) -> int:
        return max(len(messages) - 7, 0)

    def stream(self, prompt: list[dict[str, str]], **options: Any) -> Iterator[str]:
        self.asked.append([m["content"] for m in prompt])
        if prompt[-1]["content"] == "early":
            raise KeyboardInterrupt
        yield f"answer {len(self.asked)}"
        if prompt[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        if prompt[-1]["content"] == "fail":
            raise ModelError("M105", "too long")


def test_what_a_turn_sends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    fake = FakeLLM()
    lines = iter(["one", "interrupt", " two ", "fail", "three", "", "/new", "four", "/exit"])
    monkeypatch.setattr(tool, "_open", lambda args: (fake, 0.0))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    args = argparse.Namespace(target="cpp", max_tokens=9, temperature=0.0, seed=None)
    assert tool.chat(args) == 0
    assert fake.asked == [
        ["one"],
        ["one", "answer 1", "interrupt"],
        ["one", "answer 1", "interrupt", "answer 2", "two"],
        ["one", "answer 1", "interrupt", "answer 2", "two", "answer 3", "fail"],
        ["one", "answer 1", "interrupt", "answer 2", "two", "answer 3", "three"],
        ["four"],
    ]
    printed = capsys.readouterr()
    assert printed.out.count("[stopped]") == 1 and "ModelError[M105]" in printed.err


def typed(monkeypatch: pytest.MonkeyPatch, fake: FakeLLM, lines: list[str]) -> int:
    """A chat in which these lines are typed; `^C` is the key."""
    left = iter(lines)

    def line(prompt: str) -> str:
        found = next(left)
        if found == "^C":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(tool, "_open", lambda args: (fake, 0.0))
    monkeypatch.setattr("builtins.input", line)
    args = argparse.Namespace(target="cpp", max_tokens=9, temperature=0.0, seed=None)
    return tool.chat(args)


def test_ctrl_c_before_the_first_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The question leaves no trace, and nobody else's counts are printed."""
    fake = FakeLLM()
    assert typed(monkeypatch, fake, ["one", "early", "two", "/exit"]) == 0
    assert fake.asked == [["one"], ["one", "answer 1", "early"], ["one", "answer 1", "two"]]
    printed = capsys.readouterr().out
    assert printed.count("[stopped]") == 1 and printed.count("written at") == 2


def test_ctrl_c_at_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    fake = FakeLLM()
    assert typed(monkeypatch, fake, ["one", "^C", "^C", "two", "/exit"]) == 0
    assert fake.asked == [["one"], ["one", "answer 1", "two"]]
    assert capsys.readouterr().out.count("[/exit or Ctrl-D leaves]") == 2


def test_ctrl_c_just_as_an_answer_ends(monkeypatch: pytest.MonkeyPatch):
    class Late(FakeLLM):
        """The key is pressed while the counts are printed."""

        @property
        def latest(self) -> Request:
            raise KeyboardInterrupt

        @latest.setter
        def latest(self, request: Request) -> None:
            pass

    fake = Late()
    assert typed(monkeypatch, fake, ["one", "two", "/exit"]) == 0
    assert fake.asked == [["one"], ["one", "answer 1", "two"]]


def test_a_long_conversation_loses_its_oldest_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake = FakeLLM()
    lines = iter([*"abcdef", "/exit"])
    monkeypatch.setattr(tool, "_open", lambda args: (fake, 0.0))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    args = argparse.Namespace(target="cpp", max_tokens=9, temperature=0.0, seed=None)
    assert tool.chat(args) == 0
    assert fake.asked[-1] == ["c", "answer 3", "d", "answer 4", "e", "answer 5", "f"]
    assert "oldest messages no longer fit" in capsys.readouterr().out


# ---------------------------------------------------------------------------- Ctrl-C, at a terminal


class Terminal:
    """A chat at a pseudo-terminal: what it shows is read until an awaited text stands there."""

    def __init__(self, *arguments: str | Path) -> None:
        pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
        self.here, there = pty.openpty()
        command = [*COMMAND, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, start_new_session=True,
            preexec_fn=self._take_over,  # noqa: PLW1509 - only a system call
        )  # fmt: skip
        os.close(there)
        self.shown = ""

    @staticmethod
    def _take_over() -> None:
        """In the child: the terminal is its own, so that keys become signals; these are ignored
        where the tests run in the background of a shell, and Python would leave it so."""
        import fcntl
        import termios

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, text: str) -> str:
        """What is shown up to `text`, from where the last call ended."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.here], [], [], left)[0], self.shown
            try:
                read = os.read(self.here, 4096)
            except OSError:  # the other side is closed
                read = b""
            assert read, f"it ended before {text!r}: {self.shown}"
            self.shown += read.decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def until_it_reads(self) -> None:
        """Waits until the process sleeps, which it does behind its prompt only: a signal that comes
        between the prompt and the read is seen after the read."""
        stat, deadline = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + PATIENCE_S
        while stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self.here, text.encode())

    def close(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self.here)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(smollm: Path):
    terminal = Terminal("chat", smollm, "--max-tokens", "1500", "--context", "2048")
    try:
        terminal.until("\n> ")
        terminal.type("Write a very long story about a dragon.\n")
        terminal.until("dragon.")  # the echo
        terminal.until(" ")  # a first word of the answer
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("[stopped]")
        terminal.until("\n> ")
        terminal.type("What is the capital of France?\n")
        terminal.until("written at")  # a whole answer, its counts behind it
        terminal.until("\n> ")
        terminal.type("/exit\n")
    finally:
        status = terminal.close()
    assert status == 0


def test_keys_at_the_prompt(tiny: Path):
    """Ctrl-C clears the line and says how to leave; Ctrl-D leaves."""
    terminal = Terminal("chat", tiny)
    try:
        for _ in range(2):
            terminal.until("\n> ")
            terminal.until_it_reads()
            terminal.type("half a question\x03")
            terminal.until("[/exit or Ctrl-D leaves]")
        terminal.until("\n> ")
        terminal.type("/new\n")  # alone on its line: what was typed before is gone
        assert "/new" in terminal.until("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE_S) == 0
    finally:
        status = terminal.close()
    assert status == 0 and "written at" not in terminal.shown
