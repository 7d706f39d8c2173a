"""Renders a chat template in a process of its own, under limits of time and memory.

`chat.py` runs this file as a script. It imports Jinja and the standard library only, to start fast.
Input and output are lines of JSON. The first line is the setup: `path` (sys.path), `source`,
`seconds` of processor time for one answer, `bytes` of memory. Each later line holds the variables
of one rendering. The answer is {"text": ...},
{"refused": ...} where the template called raise_exception, or {"error": ...}. SIGPROF ends the
process at the limit of time. The environment has what `transformers` gives to chat templates.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn


class Refused(Exception):
    """The template refuses these messages."""


def raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def tojson(value: object, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """JSON without Jinja's escapes for HTML. Surrogates stay: `chat.py` gives them a meaning."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    if ensure_ascii:
        text = re.sub("[^\0-~\ud800-\udfff]", lambda c: json.dumps(c[0])[1:-1], text)
    return text


def compiled(source: str) -> Any:
    """The template in Jinja's immutable sandbox."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    resource.setrlimit(resource.RLIMIT_AS, (setup["bytes"], setup["bytes"]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})

    def attempt(work: Callable[[], str]) -> dict[str, str]:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            return {"text": work()}
        except Refused as error:
            return {"refused": str(error)[:200]}
        except Exception as error:  # the parser and the template's own code may fail in any way
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    templates: list[Any] = []
    compilation = attempt(lambda: templates.append(compiled(setup["source"])) or "")
    for line in sys.stdin:
        variables = json.loads(line)
        answer = attempt(lambda v=variables: templates[0].render(v)) if templates else compilation
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
