"""What all tests share: tiny random models on disk, made once per test process, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier import cli


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model folder of every architecture, by its name."""
    from luthier.model import tiny

    place = tmp_path_factory.mktemp("tiny")
    return {name: tiny.write(place / name, name) for name in tiny.ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_folder(tiny_models: dict[str, Path]) -> Path:
    """The tiny llama's folder. Copy it before changing anything."""
    return tiny_models["llama"]


@pytest.fixture
def run(capsys):
    """Call the command line; return (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(end.value.code or 0), out, err

    return run
