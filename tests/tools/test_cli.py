"""The command line: exit statuses, messages without tracebacks, and the small verbs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tilewright import errors, knobs
from tilewright.toolchain import disk_cache
from tilewright.tools import cli, env


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tilewright", *arguments]
    return subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=300)


def test_python_m_tilewright_is_the_command_line():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("tilewright ")


def test_an_error_prints_its_message_and_no_traceback():
    done = run("show", "no-such-file.py")
    assert done.returncode == 2
    assert done.stderr.startswith("ProgramError[P101]") and "Traceback" not in done.stderr


def test_nothing_to_do_prints_the_verbs(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in cli.VERBS)


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sing"])
    assert caught.value.code == 2
    assert "sing" in capsys.readouterr().err


def test_standard_output_may_be_closed():
    command = f"{sys.executable} -m tilewright --version >&-"
    done = subprocess.run(command, shell=True, check=False, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 0 and done.stderr == b""


def test_what_can_be_written(tmp_path):
    cli.check_output("--html", tmp_path / "new.json")
    (tmp_path / "old.json").touch()
    cli.check_output("--html", tmp_path / "old.json")
    for path in (tmp_path, tmp_path / "none" / "x.json", tmp_path / "old.json" / "x.json"):
        with pytest.raises(errors.ArgumentError, match="A109") as e:
            cli.check_output("--html", path)
        assert e.value.where == "--html"


def test_an_interrupt_exits_with_130(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "env", interrupted)
    assert cli.main(["env"]) == 130


def test_listing_the_verbs_loads_no_optional_package():
    code = (
        "import sys; from tilewright.tools import cli; cli.main([])\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'cuda'} & set(sys.modules)\n"
        "tools = [m for m in sys.modules if m.startswith('tilewright.tools.')]\n"
        "assert not heavy and tools == ['tilewright.tools.cli'], (heavy, tools)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr


# ---- env --------------------------------------------------------------------------------------


def test_env_reports_every_section(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for section in ("Python", "CPU target", "Kernel cache", "Packages", "CUDA target"):
        assert f"{section}\n" in printed


def test_a_missing_package_comes_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(env, "_version", lambda distribution: "")
    scipy = next(f for f in env.report() if f.name == "scipy")
    assert scipy.state == "missing" and scipy.hint == "pip install 'tilewright[scipy]'"


def test_every_package_of_an_extra_is_listed(monkeypatch):
    monkeypatch.setattr(env, "_version", lambda distribution: "")
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    del extras["dev"]
    names = {re.split("[^a-z0-9_-]", need)[0] for needs in extras.values() for need in needs}
    listed = {f.name: f.hint for f in env.report() if f.section == "Packages"}
    assert listed.keys() == names | {"numpy"}
    for name, hint in listed.items():
        extra = hint.partition("[")[2].rstrip("]'")
        assert name == "numpy" or any(need.startswith(name) for need in extras[extra])
    assert listed["torch"] == "pip install 'tilewright[torch]'"


def test_a_broken_probe_is_a_line_of_the_report(monkeypatch, capsys):
    def broken():
        raise OSError("the disk is gone")

    monkeypatch.setattr(env, "_cache", broken)
    assert cli.main(["env"]) == 1
    printed = capsys.readouterr().out
    assert "the disk is gone" in printed and "CUDA target" in printed


def test_a_bad_knob_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_THREADS", "many")
    bad = [f for f in env.report() if f.state == "bad"]
    assert any("TILEWRIGHT_THREADS" in f.name + f.value for f in bad)


def test_a_compiler_that_cannot_be_asked_is_bad_not_missing(tmp_path):
    script = tmp_path / "mycxx"
    script.write_text("#!/bin/sh\necho mycxx 1.0\n", encoding="utf-8")
    script.chmod(0o755)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with knobs.scope(cache_dir=tmp_path / "cache", cxx=str(script)):
        found = next(f for f in env.report() if f.name == "C++ compiler")
    assert found.state == "bad" and "0777" in found.value


@pytest.mark.parametrize("text", ["no-such-compiler", "no-such-launcher g++"])
def test_a_compiler_that_was_set_and_fails_is_bad_not_missing(text, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with knobs.scope(cxx=text):
        found = next(f for f in env.report() if f.name == "C++ compiler")
    assert found.state == "bad" and f"TILEWRIGHT_CXX={text!r}" in found.value
    monkeypatch.setenv("PATH", "")
    with knobs.scope(cxx=""):
        found = next(f for f in env.report() if f.name == "C++ compiler")
    assert found.state == "missing" and "g++" in found.hint


# ---- cache ------------------------------------------------------------------------------------


def test_cache_lists_and_clears(tmp_path, capsys):
    with knobs.scope(cache_dir=tmp_path / "kernels"):
        disk_cache.put("so", disk_cache.key_of("one"), b"library")
        assert cli.main(["cache", "ls"]) == 0
        listed = capsys.readouterr().out
        assert "1 entries" in listed and "shared library" in listed
        assert cli.main(["cache", "clear"]) == 0
        assert "removed 1 entries" in capsys.readouterr().out
        assert list(disk_cache.current().entries()) == []


# ---- explain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(errors.CATALOG))
def test_every_code_is_explained(code, capsys):
    assert cli.main(["explain", code.lower()]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{code}: {errors.CATALOG[code]}")


def test_explanations_are_of_codes_that_exist():
    assert set(errors.ADVICE) <= set(errors.CATALOG)
    assert all(text.strip() == text and text for text in errors.ADVICE.values())


def test_an_unknown_code_names_its_neighbours(capsys):
    assert cli.main(["explain", "F999"]) == 2
    assert "no error code F999" in capsys.readouterr().err
