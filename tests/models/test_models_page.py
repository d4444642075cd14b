"""The page of models and ``--list_models`` say the same, and what they say is complete."""

from __future__ import annotations

import subprocess
import sys

import pytest

from curation import backends
from curation.backends.extract import families as extractors
from curation.backends.generate.presets import known_models, presets
from curation.caption import known_models as captioners
from curation.extract.catalogue import known_models as directives
from curation.models.known import spelling
from tests import ROOT
from tests.models.models_page import PAGE, page
from tests.test_architecture import HEAVY


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text("utf-8") == page(), "python -m tests.models.models_page writes the page anew"


def test_every_model_says_its_licence_and_size_and_no_two_have_one_name() -> None:
    for models in (known_models(), captioners(backends.families("caption"))):
        for model in models:
            assert model.parameters > 0 and model.licence and "/" in model.source, model.short
            assert "/" not in model.short
        names = [name for model in models for name in {spelling(name) for name in model.names}]
        assert len(set(names)) == len(names)
    for model in directives(extractors()):
        assert bool(model.source) == bool(model.licence), model.short
    for preset in presets().values():
        assert preset.parameters or preset.model.startswith("embedded/")


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("01_filter_noface.py", "centerface"),
        ("02_captions_processor.py", "tulu3:fairclip"),
        ("03_generate_images_multigpu.py", "z-image-turbo"),
        ("05_recaption.py", "qwen3-vl-4b"),
        ("06_metadata.py", "oai-clip-vit-b32"),
    ],
)
def test_the_list_needs_no_other_option_no_network_and_no_heavy_library(script: str, name: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--list_models"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & set(HEAVY)
    assert name in [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert f"curation models fetch {script[:2]} " in done.stdout and "check each model card" in done.stdout
