"""Command lines of the three tools that stage 05 stands for, as their READMEs have them: each flag means the same."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest

from curation import backends
from curation.caption.captioner import resolve
from curation.options import parse_options

stage = importlib.import_module("05_recaption")
CC3M = "https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-train-"

LINES: list[tuple[str, dict[str, Any]]] = [
    # datacomp-caption: caption_dataset.py
    ("--num-gpus 4", {"num_gpus": 4}),
    ("--gpus 0,2,3", {"gpus": "0,2,3"}),
    ("--resume", {"resume": True}),
    (
        "--model florence-community/Florence-2-base --detail detailed --batch-size 16 --data-dir wds "
        "--output-dir wds/captions --resume",
        {
            "model": "florence-community/Florence-2-base",
            "detail": "detailed",
            "batch_size": 16,
            "input": ("wds",),
            "output": "wds/captions",
            "resume": True,
        },
    ),
    ("--list-models", {"list_models": True}),
    ("--quantize 4bit", {"quantize": "4bit"}),
    # simple-image-recaptioning: main.py
    (f"--data_path={CC3M}0000.tar", {"input": (f"{CC3M}0000.tar",)}),
    (f"{CC3M}0000.tar", {"input": (f"{CC3M}0000.tar",)}),
    ("--model_name=llava", {"model": "llava"}),
    ("--model_name=qwen", {"model": "qwen"}),
    ("-b 48", {"batch_size": 48}),
    ("--batch_size=48", {"batch_size": 48}),
    ("--dataloader_num_workers=8", {"dataloader_num_workers": 8}),
    ("-o sample_outputs", {"output": "sample_outputs"}),
    ("--output_dir=sample_outputs", {"output": "sample_outputs"}),
    ("--max_tokens=120", {"max_tokens": 120}),
    ("--detect_watermarks", {"detect_watermarks": True}),
    ("--detect_watermarks=True -b 1", {"detect_watermarks": True, "batch_size": 1}),
    ("--detect_watermarks True -b 1", {"detect_watermarks": True, "batch_size": 1}),
    ("--detect_watermarks=False", {"detect_watermarks": False}),
    # ContraStyles: batched_image_inference.py, run_captioning.sh
    ("--max-images 100 --no-push", {"max_images": 100, "push": False}),
    ("--model google/gemma-3-4b-it", {"model": "google/gemma-3-4b-it"}),
    (
        "--batch-size 4 --push-every 1000 --model google/gemma-3-12b-it",
        {"batch_size": 4, "push_every": 1000, "model": "google/gemma-3-12b-it"},
    ),
    (
        "--model google/gemma-3-27b-it --max-images 1000 --push-every 500 --hf-repo ContraStylesRecap "
        "--hf-username somepago",
        {
            "model": "google/gemma-3-27b-it",
            "max_images": 1000,
            "push_every": 500,
            "hf_repo": "ContraStylesRecap",
            "hf_username": "somepago",
        },
    ),
    ("--max-tokens 256", {"max_tokens": 256}),
    ("--checkpoint-dir ./checkpoints", {"output": "./checkpoints"}),
]


def other_spelling(line: str) -> str:
    """``--batch-size`` for ``--batch_size`` and the other way round; values stay."""
    words = []
    for word in line.split():
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            name = flag[2:]
            flag = "--" + (name.replace("-", "_") if "-" in name else name.replace("_", "-"))
        words.append(flag + equals + value)
    return " ".join(words)


@pytest.mark.parametrize("spelled", [str, other_spelling], ids=["as written", "the other way"])
@pytest.mark.parametrize(("line", "meant"), LINES, ids=[line for line, _ in LINES])
def test_a_command_line_of_the_readmes(line: str, meant: dict[str, Any], spelled: Any) -> None:
    words = spelled(line).split()
    options = parse_options(stage.Options, words if "input" in meant else ["x", *words])
    assert {name: getattr(options, name) for name in meant} == meant
    untouched = parse_options(stage.Options, ["x"])
    named = {*meant, "input"}
    for field in dataclasses.fields(options):
        if field.name not in named:
            assert getattr(options, field.name) == getattr(untouched, field.name), "no other option is changed"


def test_a_switch_wants_a_truth(capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main(["x", "--detect_watermarks=yes"]) == 2
    assert "--detect_watermarks: needs True or False, not 'yes'" in capsys.readouterr().err


def test_the_pipe_of_a_readme() -> None:
    """Its command is one argument, spaces and braces and all."""
    pipe = f"pipe:curl -s -f -L {CC3M}{{0000..0575}}.tar"
    assert parse_options(stage.Options, [f"--data_path={pipe}"]).input == (pipe,)


def test_the_models_of_the_readmes_are_known() -> None:
    for model in {meant["model"] for _, meant in LINES if "model" in meant}:
        assert resolve(model, backends.families("caption"))[0].name in ("florence2", "llava", "qwen", "gemma3")
