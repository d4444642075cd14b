"""What becomes of a model that the hub does not give: one line, against a real server of the hub's routes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.servers.hub import TOKEN, Model, serve

FLUX, GEMMA = "black-forest-labs/FLUX.1-schnell", "google/gemma-3-4b-it"
FREE = "--model z-image-turbo (Tongyi-MAI/Z-Image-Turbo, Apache-2.0)"


def python(home: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **extra}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)


ASK = """
import sys
from pathlib import Path
from curation.backends.generate.presets import known_models
from curation.errors import InfrastructureError
from curation.models.hub_cache import resolve
from curation.models.needs import whole_model
from curation.models.weights import fetch_weights

PIPELINE = ("model_index.json", "diffusers pipeline")
WAYS = {
    "resolve": lambda model: resolve(model, known=known_models()),
    "fetch": lambda model: whole_model(model, None, None, PIPELINE, list, None, known_models()).fetch(dry_run=False),
    "file": lambda model: fetch_weights(f"{model}:model_index.json", None, Path("nowhere"), name="clip"),
}
for words in sys.argv[1:]:
    way, model = words.split("=")
    try:
        WAYS[way](model)
        print("no error", file=sys.stderr)
    except InfrastructureError as error:
        print(error, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "config.json").write_text("{}")
    return {FLUX: Model(folder, gated=True), "somebody/no-pipeline": Model(folder)}


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(models: dict[str, Model], tmp_path: Path) -> None:
    misspelt = "stabilityai/sdxl-trubo"
    with serve(models) as hub:
        accept = f"gated; accept its licence at {hub.url}/{FLUX}, then give a token of that account"
        for extra, asked in {
            (): [f"resolve={FLUX}", f"fetch={FLUX}", f"file={FLUX}"],
            (("HF_TOKEN", "hf_of_another_account"),): [f"fetch={FLUX}", f"file={FLUX}"],
        }.items():
            done = python(tmp_path, "-c", ASK, *asked, HF_ENDPOINT=hub.url, **dict(extra))
            lines = done.stderr.splitlines()
            assert len(lines) == len(asked), done.stderr
            for way, line in zip(asked, lines, strict=True):
                assert f"{FLUX}: {accept}: `hf auth login`, or HF_TOKEN" in line
                assert (FREE in line) == (not way.startswith("file")), "what takes its place is known by the flag"
        asked = [f"resolve={misspelt}", f"fetch={misspelt}", f"file={misspelt}"]
        asked += ["fetch=somebody/no-pipeline", "file=somebody/no-pipeline"]
        *missing, entry, file = python(tmp_path, "-c", ASK, *asked, HF_ENDPOINT=hub.url).stderr.splitlines()
        assert all("the hub shows no such model" in line and "hf auth login" in line for line in missing)
        assert sum("Did you mean stabilityai/sdxl-turbo" in line for line in missing) == 2
        assert all("its repository has no model_index.json: it is a model of another kind" in x for x in (entry, file))


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_refusals_by_status(status: int, code: str, models: dict[str, Model], tmp_path: Path) -> None:
    """Gated or not, by what the hub answers to a request for a file; 401 without a code is a token that is none."""
    with serve({FLUX: Model(models[FLUX].folder, refuses=(status, code))}) as hub:
        done = python(tmp_path, "-c", ASK, f"fetch={FLUX}", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    line = done.stderr.strip()
    assert ("gated; accept its licence" in line) == (code == "GatedRepo"), line
    assert ("the hub refuses the token" in line) == (code == ""), line
    assert "`hf auth login`, or HF_TOKEN" in line


def test_without_a_hub_a_gated_model_is_known_as_one(tmp_path: Path) -> None:
    for extra, why in {
        (("HF_HUB_OFFLINE", "1"),): "is not in the hub's cache and HF_HUB_OFFLINE is set",
        (("HF_ENDPOINT", "http://127.0.0.1:9"),): "the hub does not answer",
    }.items():
        done = python(tmp_path, "-c", ASK, f"resolve={FLUX}", "resolve=stabilityai/sdxl-turbo", **dict(extra))
        gated, free = done.stderr.splitlines()
        assert why in gated and why in free
        assert "The model is gated; accept its licence at" in gated and FREE in gated
        assert "gated" not in free and "curation models fetch STAGE` with the same options" in free
