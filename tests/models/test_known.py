"""Short names of models: what they stand for, what is suggested for one that is none, and what the table tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curation.errors import UsageError
from curation.models import listing
from curation.models.hub_cache import hub_folder
from curation.models.known import Model, find, free_alternative, model_of, weights_gb

MARKER = "model_index.json"
MODELS = (
    Model("flux.1-schnell", "bfl/FLUX.1-schnell", 16.86, "Apache-2.0", gated=True, other_names=("flux-schnell",)),
    Model("sd-turbo", "stability/sd-turbo", 1.29, "Stability", steps=1),
    Model("sdxl-turbo", "stability/sdxl-turbo", 3.47, "Stability"),
    Model("z-image-turbo", "Tongyi/Z-Image-Turbo", 10.26, "Apache-2.0"),
    Model("small", "somebody/small", 0.5, "MIT"),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["sdxl-turbo", "SDXL_Turbo", "sdxl.turbo", "SDXLTurbo", " sdxl turbo"])
def test_the_spelling_of_a_short_name_is_forgiven(name: str) -> None:
    assert model_of(name, MODELS, MARKER) == ("stability/sdxl-turbo", "")


def test_other_names_paths_and_hub_ids(here: Path) -> None:
    assert model_of("Flux_Schnell", MODELS, MARKER)[0] == "bfl/FLUX.1-schnell"
    assert model_of("FLUX.1-schnell", MODELS, MARKER)[0] == "bfl/FLUX.1-schnell"
    for name in ("somebody/SDXL-Turbo", "./sdxl-turbo", "/models/none", "models/sdxl-turbo/"):
        assert model_of(name, MODELS, MARKER) == (name, ""), "it stays as it is"
    assert model_of("~/models/x", MODELS, MARKER) == (str(Path.home() / "models" / "x"), "")
    (here / "own").mkdir()
    (here / "own.safetensors").touch()
    assert model_of("own", MODELS, MARKER) == ("own", "")
    assert model_of("own.safetensors", MODELS, MARKER) == ("own.safetensors", "")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sdxl-trubo", "sdxl-turbo (stability/sdxl-turbo)"),
        ("flux", "flux.1-schnell (bfl/FLUX.1-schnell)"),
        ("zimage", "z-image-turbo (Tongyi/Z-Image-Turbo)"),
        ("turbo", "sdxl-turbo"),
    ],
)
def test_an_unknown_short_name_is_told_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match="no model has this short name, and there is no such folder") as error:
        model_of(name, MODELS, MARKER)
    assert "Did you mean" in str(error.value) and meant in str(error.value)
    assert "--list_models" in str(error.value)


def test_a_name_like_no_other_is_told_where_the_names_are() -> None:
    with pytest.raises(UsageError, match="--list_models shows the short names") as error:
        model_of("qqqq", MODELS, MARKER)
    assert "Did you mean" not in str(error.value)


def test_a_folder_with_a_model_goes_before_the_short_name_and_the_log_says_so(here: Path) -> None:
    folder = here / "sdxl-turbo"
    folder.mkdir()
    found, line = model_of("sdxl-turbo", MODELS, MARKER)
    assert found == "stability/sdxl-turbo" and f"the folder ./sdxl-turbo is no model (it has no {MARKER})" in line
    (folder / MARKER).touch()
    found, line = model_of("sdxl-turbo", MODELS, MARKER)
    assert found == "sdxl-turbo" and line.endswith("the model of that name on the hub is --model stability/sdxl-turbo")
    assert model_of("SDXL_turbo", MODELS, MARKER) == ("stability/sdxl-turbo", ""), "another name than the folder's"


def test_what_takes_the_place_of_a_gated_model_is_free_and_of_its_size() -> None:
    assert getattr(free_alternative("BFL/flux.1-schnell", MODELS), "short", None) == "z-image-turbo"
    assert getattr(free_alternative("somebody/unknown", MODELS), "short", None) == "z-image-turbo", "the largest"
    tiny = Model("tiny", "x/tiny", 0.4, "Gemma terms", gated=True)
    assert getattr(free_alternative("x/tiny", (*MODELS, tiny)), "short", None) == "small"
    assert free_alternative("x/tiny", (tiny,)) is None


def test_weights_are_parameters_times_bytes() -> None:
    assert weights_gb(7, 16) == 14
    assert weights_gb(8, 4) == 4
    assert find("sd-turbo", MODELS).weights_gb == pytest.approx(2.58)  # type: ignore[union-attr]


def test_the_table_has_a_line_for_each_model_and_no_column_without_content() -> None:
    head, *lines = listing.table(MODELS, lambda model: "yes" if model.short == "small" else "no")
    assert head.split() == ["name", "hub", "id", "weights", "steps", "here", "gated", "licence"]
    assert [line.split()[0] for line in lines] == [model.short for model in MODELS]
    assert lines[0].split()[1:] == ["bfl/FLUX.1-schnell", "33.7", "GB", "-", "no", "yes", "Apache-2.0"]
    assert lines[-1].split()[1:] == ["somebody/small", "1.0", "GB", "-", "yes", "no", "MIT"]


@pytest.mark.parametrize("word", ["--list_models", "--list-models"])
def test_the_table_is_asked_for_by_one_word(word: str) -> None:
    assert listing.asks_for_models(["--input", "x", word])
    assert not listing.asks_for_models(["--input", "list_models", "--model", "x"])


def test_what_the_hubs_cache_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here))
    model, pipeline = MODELS[1], listing.on_this_machine(MARKER)
    assert pipeline(model) == "no"
    folder = hub_folder(model.source) / "snapshots" / ("c" * 40)
    for part in ("unet", "scheduler", "text_encoder"):
        (folder / part).mkdir(parents=True)
    assert pipeline(model) == "no"
    parts = {"unet": ["diffusers", "UNet"], "scheduler": ["diffusers", "X"], "safety_checker": [None, None]}
    (folder / MARKER).write_text(json.dumps({"_class_name": "X", **parts, "text_encoder": ["transformers", "Y"]}))
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert pipeline(model) == "in part"
    (folder / "text_encoder" / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "text_encoder" / "model-1.safetensors").touch()
    assert pipeline(model) == "in part"
    (folder / "text_encoder" / "model-2.safetensors").symlink_to("blob")
    assert pipeline(model) == "in part", "a link to a file that is not there"
    (folder / "text_encoder" / "blob").touch()
    assert pipeline(model) == "yes"
    (folder / MARKER).write_text('["hostile"]')
    assert pipeline(model) == "in part"
    assert listing.on_this_machine("config.json")(model) == "no"
