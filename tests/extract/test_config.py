"""dataset2metadata's YAML as it is, flags before it, and what is wrong told with the nearest name."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from curation.backends.extract import families
from curation.errors import UsageError
from curation.extract import FLAGS, KEYS, Catalogue, ExtractConfig, read_config
from curation.extract.config import ALL, model_settings
from curation.extract.settings import ModelSettings, WeightSource

# The two examples of dataset2metadata's README: what they ask for, in its words and its order.
BASIC = """
models: # model directives, specifying the models to instantiate
  - oai-clip-vit-b32
postprocess_columns: # postprocessing directives
  - oai-clip-vit-b32-score
postprocess_features: # saved in an npz format
  - oai-clip-vit-b32-image
  - oai-clip-vit-b32-text
additional_fields: # fields in a webdataset json to carry over into the metadata
  - uid
  - url
  - caption
  - original_width
  - original_height
  - sha256
nworkers: 2
batch_size: 512
device: 0
input_tars: "path/to/my/tars/000057{17..19}.tar" # braceexpand suported, can also be s3 paths
output_metadata_dir: "path/to/my/ouput/metadata" # can be arbitrary path
custom_pypath: null # if model, preprocessors, postprocessors not known, look in this python file
reprocess: True # if true will process from scratch, else will just process tars not already processed
"""
DATACOMP = BASIC.replace(
    "  - oai-clip-vit-b32\npost",
    "  - oai-clip-vit-b32\n  - oai-clip-vit-l14\n  - nsfw-detoxify\n  - nsfw-image-oai-clip-vit-l-14\n"
    "  - faces-scrfd10g\n  - dedup-isc-ft-v107\npost",
).replace(
    "  - oai-clip-vit-b32-score\n",
    "  - oai-clip-vit-b32-score\n  - oai-clip-vit-l14-score\n  - nsfw-detoxify-score\n  - nsfw-image-score\n"
    "  - face-boxes\n  - dedup-isc-ft-v107-score\n",
).replace(
    "  - oai-clip-vit-b32-text\n",
    "  - oai-clip-vit-b32-text\n  - oai-clip-vit-l14-image\n  - oai-clip-vit-l14-text\n  - dedup-isc-ft-v107-image\n",
)  # fmt: skip


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yml"
    path.write_text(textwrap.dedent(text), "utf-8")
    return str(path)


def read(tmp_path: Path, text: str, **flags: Any) -> ExtractConfig:
    return read_config(write(tmp_path, text), flags)


def test_the_readmes_first_example(tmp_path: Path) -> None:
    assert read(tmp_path, BASIC) == ExtractConfig(
        models=("oai-clip-vit-b32",),
        input_tars=("path/to/my/tars/000057{17..19}.tar",),
        output_metadata_dir="path/to/my/ouput/metadata",
        postprocess_columns=("oai-clip-vit-b32-score",),
        postprocess_features=("oai-clip-vit-b32-image", "oai-clip-vit-b32-text"),
        additional_fields=dict.fromkeys(("uid", "url", "caption", "original_width", "original_height", "sha256")),
        nworkers=2,
        batch_size=512,
        device=0,
        reprocess=True,
    )


def test_the_readmes_second_example_asks_for_every_directive(tmp_path: Path) -> None:
    config = read(tmp_path, DATACOMP)
    assert len(config.models) == 6 and len(config.postprocess_columns) == 6 and len(config.postprocess_features) == 5
    Catalogue(families(), config).check_outputs_early()


def test_the_keys_that_the_readme_does_not_name(tmp_path: Path) -> None:
    more = "use_datacomp_keys: True\nwarn_and_continue: True\ntars_per_wds: 160\nlogging: False\n"
    config = read(tmp_path, BASIC + more)
    assert (config.use_datacomp_keys, config.warn_and_continue, config.tars_per_wds, config.logging) == (
        True, True, 160, False
    )  # fmt: skip
    assert config.public_name("oai-clip-vit-b32-score") == "clip_b32_similarity_score"
    assert config.public_name("nsfw-image-score") == "nsfw-image-score"


def test_input_tars_as_a_list(tmp_path: Path) -> None:
    text = 'models: [statistics]\noutput_metadata_dir: out\ninput_tars:\n  - "a/1.tar"\n  - "b/{2,3}.tar"\n'
    assert read(tmp_path, text).input_tars == ("a/1.tar", "b/{2,3}.tar")


def test_a_flag_goes_before_the_yaml(tmp_path: Path) -> None:
    flags = {
        "models": "statistics, hashes",
        "batch_size": 7,
        "additional_fields": "uid,punsafe:float64",
        "input_tars": "{a,b}.tar",
        "device": "cpu",
        "postprocess_columns": "phash",
        "reprocess": False,
        "use_datacomp_keys": None,
    }
    config = read(tmp_path, BASIC + "use_datacomp_keys: True\n", **flags)
    assert config.models == ("statistics", "hashes")
    assert config.batch_size == 7 and config.device == "cpu" and config.reprocess is False
    assert config.additional_fields == {"uid": None, "punsafe": "float64"}
    assert config.input_tars == ("{a,b}.tar",), "its comma belongs to braces"
    assert config.postprocess_columns == ("phash",)
    assert config.use_datacomp_keys, "a flag that was not given changes nothing"
    assert read(tmp_path, BASIC).device == 0
    assert read(tmp_path, BASIC, device="auto").device is None


def test_without_a_yaml_and_what_nobody_said(tmp_path: Path) -> None:
    config = read_config(None, {"models": "statistics", "input_tars": "x", "output_metadata_dir": "y"})
    assert (config.postprocess_columns, config.postprocess_features, config.batch_size) == (ALL, (), 512)


def test_weights_in_all_spellings(tmp_path: Path) -> None:
    digest = "ab" * 32
    url = f"https://example.org/w.pt#sha256={digest}"
    text = f"{BASIC}weights:\n  oai-clip-vit-b32: /models/b32\nembeddings: {url}\n"
    config = read(tmp_path, text)
    assert config.weights == {"oai-clip-vit-b32": WeightSource("/models/b32")}
    assert config.embeddings == WeightSource("https://example.org/w.pt", digest)
    assert read(tmp_path, text, weights="oai-clip-vit-b32=org/model@v1").weights == {
        "oai-clip-vit-b32": WeightSource("org/model@v1")
    }


def test_a_directives_own_dtype_goes_before_the_flag(tmp_path: Path) -> None:
    text = BASIC.replace("- oai-clip-vit-b32\npost", "- OAI_clip_vit_b32: {dtype: bfloat16}\n  - statistics\npost")
    config = Catalogue(families(), read(tmp_path, text, dtype="float32")).config
    assert config.models == ("oai-clip-vit-b32", "statistics")
    assert [model_settings(config, name).dtype for name in config.models] == ["bfloat16", "float32"]
    assert config.precision == {"": "float32", "oai-clip-vit-b32": "bfloat16"}
    assert read(tmp_path, BASIC, dtype="float32").precision == "float32"  # as older versions recorded it
    other = read(tmp_path, text, models="oai-clip-vit-b32")
    assert other.dtypes == {}, "the flag goes before the whole list"


def test_half_is_16_bits_on_a_device_only() -> None:
    import torch

    for dtype, on_gpu in (("half", torch.float16), ("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        assert ModelSettings(dtype=dtype, device="cuda:0").torch_dtype() is on_gpu  # type: ignore[arg-type]
    assert ModelSettings(dtype="half", device="cpu").torch_dtype() is torch.float32
    assert ModelSettings(dtype="auto", device="cuda:0").torch_dtype(half_on_gpu=True) is torch.float16
    assert ModelSettings(dtype="auto", device="cpu").torch_dtype(half_on_gpu=True) is torch.float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("batchsize: 5", "unknown key 'batchsize': did you mean 'batch_size'?"),
        ("wandb: yes", "unknown key 'wandb': there are additional_fields, batch_size"),
        ("batch_size: 0", "batch_size: needs a whole number, at least 1, not 0"),
        ("batch_size: many", "batch_size: needs a whole number, at least 1, not 'many'"),
        ("batch_size: 1.5", "at least 1, not 1.5"),
        ("batch_size: True", "at least 1, not True"),
        ("nworkers: -1", "nworkers: needs a whole number, at least 0"),
        ("device: gpu", "device: needs cpu or the number of a GPU"),
        ("models: 5", "models: needs a list of names"),
        ("models: [[a]]", "models: needs a list of names"),
        ("models: [{a: {dtype: half}, b: {}}]", "models: needs a list of names"),
        ("models: [{a: {dtype: float64}}]", "a: dtype needs one of auto, half, float32, float16, bfloat16"),
        ("models: [{a: {dtype: [half]}}]", "a: dtype needs one of"),
        ("models: [{a: {batch_size: 7}}]", "a: behind a directive may be {dtype: …} and no other key"),
        ("models: [{a: half}]", "a: behind a directive may be {dtype: …}"),
        ("models: [{1: {dtype: half}}]", "models: needs a list of names"),
        ("dtype: float64", "dtype: needs one of auto, half, float32, float16, bfloat16"),
        ("models: []", "has no models"),
        ("reprocess: maybe", "reprocess: needs True or False"),
        ("input_tars: []", "a path or a list of paths"),
        ("feature_dtype: float64", "feature_dtype: needs one of float16, float32"),
        ("weights: [a]", "weights: needs directive: path"),
        ("output_metadata_dir: 7", "output_metadata_dir: needs a text"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(tmp_path: Path, change: str, told: str) -> None:
    key = change.partition(":")[0]
    kept = BASIC.replace('input_tars: "', '#input_tars: "') if key == "input_tars" else BASIC
    for name in ("batch_size", "nworkers", "device", "reprocess", "output_metadata_dir"):
        if name == key:
            kept = kept.replace(f"\n{name}:", f"\n#{name}:")
    if key == "models":
        kept = kept.replace(
            "models: # model directives, specifying the models to instantiate\n  - oai-clip-vit-b32\n", ""
        )
    with pytest.raises(UsageError) as caught:
        read(tmp_path, f"{kept}\n{change}\n")
    assert told in str(caught.value) and "config.yml" in str(caught.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    for text, told in [
        ("a: [1", "not YAML"),
        ("[" * 5_000, "nested too deep"),
        ("a: &a [*a]", "its aliases stand for more than"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)),
            "its aliases",
        ),
        ("a: 2026-99-99", "not YAML"),
        ("- a\n- b\n", "no keys"),
        ("", "no keys"),
        ("models: [a]\nmodels: [b]\n", "'models' is there twice"),
        ("models: !!python/object/apply:os.system [echo]\n", "not YAML"),
    ]:
        with pytest.raises(UsageError, match=told):
            read(tmp_path, text)
    with pytest.raises(UsageError, match="cannot be read"):
        read_config(str(tmp_path / "none.yml"), {})
    with pytest.raises(UsageError, match="give --input and --output, or a --yml that has them"):
        read_config(None, {"models": "statistics"})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"models": "oai-clip-vit-b23"}, "did you mean 'oai-clip-vit-b32'"),
        ({"models": "faces"}, "unknown directive 'faces'"),
        ({"models": "clip:"}, "unknown directive"),
        (
            {"models": "somebody/clip"},
            "for a model of the hub write clip:somebody/clip or openclip:somebody/clip or siglip:somebody/clip",
        ),
        ({"models": "qqq"}, "; --list_models shows all of them"),
        ({"models": "Statistics,statistics"}, "is there twice"),
        ({"models": "statistics,statistics"}, "is there twice"),
        ({"weights": "oai-clip-vit-b33=x"}, "weights: 'oai-clip-vit-b33' is none of the models"),
    ],
)
def test_unknown_directives_fail_with_the_nearest_name(tmp_path: Path, flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Catalogue(families(), read(tmp_path, BASIC, **flags))


@pytest.mark.parametrize(
    ("name", "directive"),
    [
        ("OAI_CLIP_ViT_B32", "oai-clip-vit-b32"),
        ("openai/clip-vit-base-patch32", "oai-clip-vit-b32"),
        ("unitary/multilingual-toxic-xlm-roberta", "nsfw-detoxify"),
        ("CLIP:somebody/model", "clip:somebody/model"),
        ("clip:openai/clip-vit-base-patch32", "clip:openai/clip-vit-base-patch32"),
    ],
)
def test_a_directive_is_found_in_any_spelling_and_by_its_hub_id(tmp_path: Path, name: str, directive: str) -> None:
    found = Catalogue(families(), read(tmp_path, BASIC, models=name, weights=f"{name}=somebody/tuned")).config
    assert found.models == (directive,) and [*found.weights] == [directive]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"postprocess_columns": "oai-clip-vit-b32-scores"}, "did you mean 'oai-clip-vit-b32-score'"),
        ({"postprocess_columns": "face-boxes"}, "given by no model"),
        (
            {"models": "statistics", "postprocess_columns": "all", "postprocess_features": "x"},
            "is given by no model of `models`: there is none",
        ),
        ({"postprocess_features": "oai-clip-vit-l14-image"}, "did you mean 'oai-clip-vit-b32-image'"),
        ({"postprocess_features": "oai-clip-vit-b32-text,oai-clip-vit-b32-text"}, "is there twice"),
        ({"models": "clip:org/big@v1", "postprocess_columns": "big-probability"}, "there are big-score"),
        ({"models": "siglip:/of/one/", "postprocess_columns": "one-probabilty"}, "did you mean 'one-probability'"),
    ],
)
def test_unknown_outputs_fail_before_a_model_is_loaded(tmp_path: Path, flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Catalogue(families(), read(tmp_path, BASIC, **flags)).check_outputs_early()


def test_any_clip_and_siglip_by_hub_id(tmp_path: Path) -> None:
    every = {"postprocess_columns": "all", "postprocess_features": "all"}
    config = read(tmp_path, BASIC, models="clip:org/model,siglip:/folder/of/one", **every)
    Catalogue(families(), config).check_outputs_early()


def test_every_key_is_a_flag() -> None:
    import dataclasses
    import importlib

    stage = importlib.import_module("06_metadata")
    assert {FLAGS.get(key, key) for key in KEYS} <= {item.name for item in dataclasses.fields(stage.Options)}
