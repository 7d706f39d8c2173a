"""What the serving tests stand on: a tiny GGUF file made here, and real models where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.errors import MissingExtra
from tilewright.serve.weights import ModelFile, open_model, packaged_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a two-layer model with random weights of every kind."""
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import TinyModel

    return TinyModel().write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def runnable_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights that there are kernels for, and an output matrix of its own."""
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.serve.tiny import runnable

    return runnable().write(tmp_path_factory.mktemp("models") / "runnable.gguf")


@pytest.fixture(scope="session")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    pytest.importorskip("gguf", reason="the gguf library writes the test files")
    from tests.models.stories import write

    return open_model(write(data_dir / "llm", tmp_path_factory.mktemp("stories") / "m.gguf"))


@pytest.fixture(scope="session")
def smollm() -> ModelFile:
    try:
        return open_model(packaged_model())
    except MissingExtra as missing:
        pytest.skip(f"SmolLM2 is not installed: {missing.hint}")
