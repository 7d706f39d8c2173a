"""The chat page in headless Chromium, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the serve extra")
pytest.importorskip("uvicorn", reason="the server needs the serve extra")
pytest.importorskip("prometheus_client", reason="the server needs the serve extra")
pytest.importorskip("openai", reason="clients of the tests")

from tests.serve.test_api import PATIENCE_S, serving, until

from tilewright.serve.api import ServerLimits
from tilewright.serve.engine import LLM

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BINARY is None, reason=f"no browser: {', '.join(NAMES)}")

# The browser reads commands from descriptor 3 and writes answers to 4.
LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
QUESTION = "what <b>is</b> the <img src=x onerror=alert(1)> land & <script>alert(1)</script>"
SEED, CONTEXT = 15, 512


class Browser:
    """One page of a browser. `errors`: what its scripts threw and its console reported."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None
        reads, self._write = os.pipe()
        self._read, writes = os.pipe()

        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, f"{reads}", f"{writes}", BINARY, *FLAGS,
             f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self._numbers, self._rest, self.errors = itertools.count(1), b"", []
        self._session: str | None = None

    def connect(self) -> None:
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result; notes the errors that are reported meanwhile."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while b"\0" not in self._rest:
                ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
                assert ready, f"the browser does not answer {method}"
                more = os.read(self._read, 1 << 16)
                assert more, "the browser has ended"
                self._rest += more
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"]))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({selector!r})].map(x => x.textContent)")

    def type(self, selector: str, text: str, key: str = "Enter") -> None:
        """Types into a field as a person does, and presses a key."""
        self.value(f"document.querySelector({selector!r}).focus()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, text="\r",
                      windowsVirtualKeyCode=13)  # fmt: skip

    def ask(self, text: str) -> None:
        """Asks, and waits until the page takes another question."""
        self.type("#text", text)
        until(lambda: not self.value("document.querySelector('button').disabled"))

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.kill()
        self._process.wait(PATIENCE_S)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    one = Browser(tmp_path)
    try:
        one.connect()
        yield one
    finally:
        one.close()


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page names no seed: here each answer has the same one."""
    monkeypatch.setattr("tilewright.serve.engine.secrets.randbits", lambda bits: SEED)


@pytest.mark.usefixtures("seeded")
def test_a_conversation(browser: Browser, tmp_path: Path):
    """Two questions with their answers, the history before the second; texts are never HTML; an
    error of the server is shown, and the page goes on; the rate is that of the server."""
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    model = runnable()
    model.metadata["llama.context_length"] = CONTEXT
    path = model.write(tmp_path / "tiny.gguf")
    alone, messages = LLM(path), []
    with serving(LLM(path)) as (url, _):
        browser.send("Page.navigate", url=url)
        until(lambda: browser.texts("#model") == ["tiny"])
        for number, question in enumerate(("the", QUESTION), 1):
            browser.ask(question)
            messages.append({"role": "user", "content": question})
            wanted = alone.generate(messages, temperature=1.0, seed=SEED, max_tokens=CONTEXT)
            messages.append({"role": "assistant", "content": wanted})
            assert browser.texts("#talk > .assistant") == [m["content"] for m in messages[1::2]]
            assert browser.texts("#talk > .user") == [m["content"] for m in messages[::2]]
            assert len(browser.texts("#talk *")) == 2 * number  # nothing inside of the lines
        until(lambda: "tokens/s" in browser.texts("#rate")[0])
        long = "thethe" * 400
        browser.ask(long)
        assert f"the context {CONTEXT}" in browser.texts("#talk > .error")[0]
        assert browser.value("document.activeElement.id") == "text"
        assert browser.value("document.querySelector('#text').value") == long
        assert len(browser.texts("#talk > .assistant")) == 2
        ends = [
            f"document.querySelector('{x}').getBoundingClientRect()" for x in (".error", "form")
        ]
        assert browser.value(f"{ends[0]}.bottom <= {ends[1]}.top")  # the error is in view
        root = "document.documentElement"  # long words break
        assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")
        bad = [error for error in browser.errors if "400 (Bad Request)" not in error]
        assert not bad and len(browser.errors) == 1


def test_the_key_is_asked_for(browser: Browser, runnable_path: Path):
    with serving(LLM(runnable_path), ServerLimits(api_keys=["a key"])) as (url, _):
        browser.send("Page.navigate", url=url)
        until(lambda: browser.value("document.querySelector('#key')?.hidden") is False)
        browser.ask("the")
        assert "API key" in browser.texts("#talk > .error")[0]
        browser.type("#key", "a key")
        until(lambda: browser.texts("#model") == ["tiny"])
        browser.ask("the")
        assert len(browser.texts("#talk > .error")) == 1
        assert browser.texts("#talk > .assistant")[-1]
