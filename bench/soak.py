"""`python -m bench.soak`: a server under hostile clients, for minutes, and what it must not do.

Starts `tilewright serve` and lets clients ask, stream, leave in the middle, hang, send garbage and
bodies that are too large, while the engine's process is killed again and again. Then: every answer
is that of the same request alone (none lost, doubled or mixed), every error has OpenAI's shape, the
memory of the server stays flat, and after SIGTERM what has begun is finished.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

TEXT = "/v1/completions"
HUNG = 400  # connections kept open by the client that hangs
QUESTIONS = ("the", "and the thing", "in the land of all", "what is it", "a", "tell me more")


class Soak:
    """The clients' common state: counts of what came, and what was wrong."""

    def __init__(self, url: str, ends: float) -> None:
        self.url, self.ends = url, ends
        self.counts: collections.Counter[str] = collections.Counter()
        self.answers: dict[str, set[str]] = collections.defaultdict(set)
        self.wrong: list[str] = []

    def body(self, rng: random.Random) -> dict[str, Any]:
        return {
            "prompt": rng.choice(QUESTIONS), "max_tokens": rng.choice([1, 5, 20, 60]),
            "temperature": rng.choice([0, 1]), "seed": rng.randrange(3), "ignore_eos": True,
        }  # fmt: skip

    def note_error(self, status: int, text: str) -> None:
        self.counts[f"status {status}"] += 1
        try:
            error = json.loads(text)["error"]
            assert set(error) == {"message", "type", "param", "code"}
        except (ValueError, KeyError, AssertionError, TypeError):
            self.wrong.append(f"status {status}: {text[:200]}")

    def ask(self, client: httpx.Client, rng: random.Random) -> None:
        body = self.body(rng)
        if rng.random() < 0.5:
            answer = client.post(self.url + TEXT, json=body)
            if answer.status_code != 200:
                return self.note_error(answer.status_code, answer.text)
            text = answer.json()["choices"][0]["text"]
        else:
            text = self.stream(client, rng, body)
            if text is None:
                return None
        self.counts["answers"] += 1
        self.answers[json.dumps(body)].add(text)
        return None

    def stream(self, client: httpx.Client, rng: random.Random, body: dict[str, Any]) -> str | None:
        """The text of a stream; None where it was left or ended with an error."""
        text, leaves = "", rng.randrange(30) if rng.random() < 0.3 else 1 << 30
        with client.stream("POST", self.url + TEXT, json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                self.note_error(answer.status_code, answer.read().decode())
                return None
            for number, line in enumerate(answer.iter_lines()):
                if number >= leaves:
                    self.counts["left"] += 1
                    return None
                if line == "data: [DONE]":
                    return text
                if line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.note_error(503, line.removeprefix("data: "))
                        return None
                    text += event["choices"][0]["text"]
        self.wrong.append("a stream ended without [DONE]")
        return None

    def garbage(self, client: httpx.Client, rng: random.Random) -> None:
        kind = rng.randrange(4)
        if kind == 0:
            answer = client.post(self.url + TEXT, content=rng.randbytes(rng.randrange(400)))
        elif kind == 1:
            answer = client.post(self.url + TEXT, json={"prompt": "x" * 1_200_000})
        elif kind == 2:
            answer = client.post(self.url + TEXT, json={"prompt": 5, "n": -1})
        else:
            address = httpx.URL(self.url)
            with socket.create_connection((address.host, address.port or 80), 10) as one:
                one.sendall(rng.randbytes(2000))
            self.counts["raw bytes"] += 1
            return
        self.note_error(answer.status_code, answer.text)

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=120) as client:
            while time.monotonic() < self.ends:
                try:
                    (self.garbage if rng.random() < 0.2 else self.ask)(client, rng)
                except httpx.HTTPError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")

    def hang(self) -> None:
        """A client at another address that begins more requests and streams than it may, and reads
        and sends nothing more."""
        address, kept = httpx.URL(self.url), collections.deque[socket.socket]()
        body = json.dumps({"prompt": "the", "max_tokens": 100, "stream": True}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        while time.monotonic() < self.ends:
            one = socket.create_connection(
                (address.host, address.port or 80), 10, source_address=("127.0.0.2", 0)
            )
            length = len(body) + self.counts["hung"] % 2
            one.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
            self.counts["hung"] += 1
            kept.append(one)
            if len(kept) > HUNG:
                kept.popleft().close()
            time.sleep(0.2)
        for one in kept:
            one.close()


def children(pid: int) -> list[int]:
    """Of all threads: one that is started again is the child of the thread that did it."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(n) for file in files for n in file.read_text(encoding="utf-8").split()]


def engine_of(pid: int) -> int | None:
    """The engine's process: the child that was spawned by multiprocessing."""
    for child in children(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in words:
            return child
    return None


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    line = next(x for x in lines if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill-s", type=float, default=20.0, help="between two kills")
    parser.add_argument("--model", help="a model file (default: the packaged SmolLM2)")
    args = parser.parse_args()
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "tilewright", "serve", "--port", str(port)]
    command += [args.model] if args.model else ["--context", "512"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    soak = Soak(f"http://127.0.0.1:{port}", time.monotonic() + 60 * args.minutes)
    try:
        wait_ready(soak.url)
        threads = [threading.Thread(target=soak.client, args=(n,)) for n in range(args.clients)]
        threads.append(threading.Thread(target=soak.hang))
        for thread in threads:
            thread.start()
        memory, kills = watch(server.pid, soak, args.kill_s)
        for thread in threads:
            thread.join()
        wait_ready(soak.url)
        mixed = [body for body, texts in soak.answers.items() if len(texts) > 1]
        ended = drain(server, soak.url)
    finally:
        server.kill()
        server.wait()
    third = max(len(memory) // 3, 1)
    early, late = (sum(m) / len(m) for m in (memory[:third], memory[-third:]))
    print(json.dumps({
        "minutes": args.minutes, "counts": dict(soak.counts), "kills": kills,
        "requests": len(soak.answers), "mixed": len(mixed), "wrong": soak.wrong[:5],
        "drained": ended, "server MB": [round(early), round(late)],
    }))  # fmt: skip
    is_flat = late < 1.1 * early + 10
    return int(bool(mixed or soak.wrong or not ended or not is_flat))


def watch(pid: int, soak: Soak, kill_s: float) -> tuple[list[float], int]:
    """Kills the engine now and then; the server's memory each second, and the kills."""
    memory, kills, next_kill = [], 0, time.monotonic() + kill_s
    while time.monotonic() < soak.ends:
        time.sleep(1)
        memory.append(resident_mb(pid))
        engine = engine_of(pid)
        if time.monotonic() > next_kill and engine is not None:
            os.kill(engine, signal.SIGKILL)
            kills, next_kill = kills + 1, time.monotonic() + kill_s
    return memory, kills


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, "the server does not get ready"
        time.sleep(0.2)


def drain(server: subprocess.Popen[bytes], url: str) -> bool:
    """Whether a stream that has begun is finished after SIGTERM, and the server then ends."""
    body = {"prompt": "the", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + TEXT, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        read = [line for line in lines if line]
    return read[-1] == "data: [DONE]" and server.wait(60) in (0, -signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
