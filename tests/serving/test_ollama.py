"""The commands that give an Ollama its model can be copied as they are, wherever the project lies."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from curation.serving import ollama

NAME = "tulu3:fairclip"


def test_a_model_that_is_made_from_another_names_both_and_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, ollama.MODELFILES[NAME].parent.parent):
        monkeypatch.chdir(folder)
        pull, create = ollama.commands(NAME)
        assert pull == "ollama pull tulu3"
        *words, modelfile = shlex.split(create)
        assert words == ["ollama", "create", NAME, "-f"]
        assert Path(modelfile).read_text("utf-8").count("FROM tulu3\n") == 1
    assert modelfile == "ollama/Modelfile", "short where the current folder has it"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("", ""),
        ("http://localhost:11434", ""),
        ("http://127.0.0.1:11435", "OLLAMA_HOST=http://127.0.0.1:11435 "),
        ("https://user:secret@models.example.org", "OLLAMA_HOST=https://models.example.org "),
    ],
)
def test_any_other_model_is_pulled_by_the_server_that_lacks_it(url: str, host: str) -> None:
    assert ollama.commands("llama3.2:3b", url) == [f"{host}ollama pull llama3.2:3b"]
    assert ollama.commands("x;$(touch y)", url) == [f"{host}ollama pull 'x;$(touch y)'"]


def test_whether_the_model_is_here_is_read_from_ollamas_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    assert not ollama.has(NAME)
    for place in ("library/tulu3/fairclip", "library/tulu3/latest", "somebody/model/7b"):
        path = tmp_path / "manifests" / "registry.ollama.ai" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert all(map(ollama.has, (NAME, "tulu3", "somebody/model:7b")))
    assert not any(map(ollama.has, ("tulu3:8b", "../library/tulu3:latest", "other")))
