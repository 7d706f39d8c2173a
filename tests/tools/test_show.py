"""`tilewright show`: the stages of a file's programs, as text and as a page."""

from __future__ import annotations

import html.parser
import itertools
from pathlib import Path

import pytest

from tilewright.errors import ProgramError
from tilewright.target import target
from tilewright.toolchain import nvrtc
from tilewright.tools import cli, show

SOURCE = """
import tilewright as tw

@tw.program
def spmm(A=tw.sparse("m n"), X=tw.dense("n d")):
    i, j, k = tw.indices("i:m j:n k:d")
    return tw.out[i, k](tw.sum(A[i, j] * X[j, k], over=j))

print("the file ran")

def rows(s):
    return s.split("i", 8, into=("unit", "row")).parallel("unit")

scheduled = spmm.schedule(rows)
again = scheduled
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "lesson.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_stages_are_in_order_and_end_in_code(file, capsys):
    assert cli.main(["show", str(file), "scheduled", "--stages", "--target", "cpp"]) == 0
    printed = capsys.readouterr()
    heads = [line for line in printed.out.splitlines() if line.startswith("---- ")]
    assert heads[0] == "---- as written   (coordinates)"
    assert heads[1] == "---- coordinates_to_positions   (positions)"
    assert heads[2].startswith("---- schedule .split('i', 8") and "parallel" in heads[3]
    assert heads[-2].endswith("(loops)") and heads[-1] == "---- C++ for cpp   (C++)"
    assert 'extern "C"' in printed.out and "prelude/cpu.h" in printed.out
    assert "the file ran" in printed.err and "the file ran" not in printed.out


def test_each_stage_differs_from_the_one_before(file):
    stages = show.stages_of(show.load(file)["scheduled"], [target("cpp")])
    programs = [s.text for s in stages]
    assert len(programs) > 5
    assert all(a != b for a, b in itertools.pairwise(programs))


def test_cuda_follows_cpp_without_repeating_what_they_share(file):
    stages = show.stages_of(show.load(file)["spmm"], [target("cpp"), target("cuda:sm_90a")])
    assert [s.title for s in stages].count("as written") == 1
    assert stages[-1].level == "CUDA" and "__global__" in stages[-1].text


def test_what_cuda_refuses_is_said(file):
    file.write_text(
        SOURCE + "\nbad = spmm.schedule(lambda s: s.split('nothing', 4))\n", encoding="utf-8"
    )
    stages = show.stages_of(show.load(file)["bad"], [target("cuda:sm_90a")])
    assert [s.level for s in stages] == ["refused"]
    assert "S101" in stages[0].text


def test_without_stages_the_ends_are_shown(file, capsys):
    assert cli.main(["show", str(file), "--target", "cpp"]) == 0
    heads = [x for x in capsys.readouterr().out.splitlines() if x.startswith(("----", "===="))]
    assert [h.split()[1] for h in heads if h.startswith("====")] == ["spmm", "scheduled"]
    assert len(heads) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no program"),
        ("x = 1\n1 / 0", "ZeroDivisionError"),
        (
            "import tilewright as tw\n@tw.program\ndef p(A):\n    return A",
            "does not say what it is",
        ),
    ],
)
def test_a_file_that_cannot_be_shown(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ProgramError, match="P101") as caught:
        show.load(path)
    assert message in str(caught.value)
    if "Zero" in message:
        assert caught.value.where.endswith("bad.py:2")


def test_an_unknown_program_lists_those_there_are(file, capsys):
    assert cli.main(["show", str(file), "sddmm"]) == 2
    assert "programs: spmm, scheduled" in capsys.readouterr().err


class Reader(html.parser.HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(file, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["show", str(file), "scheduled", "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    tags = [tag for tag, _ in reader.seen]
    assert not {"link", "img", "iframe"} & set(tags)
    assert not any({"src", "srcset"} & attrs.keys() for _, attrs in reader.seen)
    assert "http" not in text and "@import" not in text and "url(" not in text
    links = {a["href"] for tag, a in reader.seen if tag == "a"}
    assert links == {f"#{a['id']}" for tag, a in reader.seen if tag == "details"}
    assert 'class="new"' in text and 'class="old"' in text


def test_the_page_escapes_what_it_shows():
    first = show.Stage("one", "loops", "a < b && c\nsame")
    second = show.Stage("</pre><script>", "loops", "a > b\nsame\nmore")
    text = show.html("<x>", {"p": [first, second]})
    assert "</pre><script>" not in text and "<x>" not in text
    assert '<td class="old">a &lt; b &amp;&amp; c</td><td class="new">a &gt; b</td>' in text
    assert "<td>same</td><td>same</td>" in text
    assert '<td></td><td class="new">more</td>' in text


@pytest.mark.skipif(not nvrtc.available(), reason="NVRTC is not installed")
def test_the_cuda_shown_compiles(file):
    from tilewright.codegen import prelude_files

    stages = show.stages_of(show.load(file)["spmm"], [target("cuda:sm_90a")])
    cubin = nvrtc.compile_cuda(stages[-1].text, arch="sm_90a", headers=prelude_files.headers())
    assert "stage0" in cubin.resources


def test_a_page_that_cannot_be_written_is_told_before_the_file_runs(file, capsys):
    file.write_text("raise RuntimeError('it ran')", encoding="utf-8")
    assert cli.main(["show", str(file), "--html", "/nonexistent/x.html"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ArgumentError[A109]") and "/nonexistent" in told


@pytest.mark.parametrize("status", ["3", "0", "'bye'", ""])
def test_a_file_that_ends_the_program(file, capsys, status):
    file.write_text(f"import sys\nsys.exit({status})\n", encoding="utf-8")
    assert cli.main(["show", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ProgramError[P101]") and "SystemExit" in told and f"{file}:2" in told


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ProgramError, match="this is no file"):
        show.load(tmp_path)
