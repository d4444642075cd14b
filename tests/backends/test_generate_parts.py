"""Stage 03's models in one file, LoRAs, other autoencoders and 8 bits: real files, read by the real code."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.backends.generate.diffusers import Backend
from curation.backends.generate.loading import load_pipeline
from curation.backends.generate.parts import (
    Part,
    Parts,
    check_fp8,
    few_steps_warnings,
    find_parts,
    is_large_matrix,
    lora_parts,
)
from curation.backends.generate.presets import Preset
from curation.backends.generate.tiny import build_atomically, save_tiny_sd
from curation.errors import InfrastructureError, UsageError
from curation.models.hub_cache import resolve
from tests.backends.test_generate import SIDE, copy_pipeline, pixels, requests
from tests.backends.tiny_pipelines import save_tiny_flux

torch = pytest.importorskip("torch")

SETTINGS = Preset(model="x", steps=1, guidance=0.0, height=SIDE, width=SIDE, dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-sd"
    build_atomically(folder, save_tiny_sd)
    return folder


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "downsamplers.0": "downsample", "upsamplers.0": "upsample", ".resnets.": ".block.",
}  # fmt: skip


def original_unet_name(name: str) -> str:
    """The name in the original Stable Diffusion of a tensor of the tiny UNet, whose levels have one layer."""
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks", "mid_block"):
        if parts[0] == "mid_block":
            place, rest = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}", parts[3:]
        elif parts[0] == "down_blocks":
            block, rest = int(parts[1]), parts[4:]
            number = 2 * block + (2 if parts[2] == "downsamplers" else 1)
            place = f"input_blocks.{number}.{1 if parts[2] == 'attentions' else 0}"
            rest = ["op", *rest[1:]] if parts[2] == "downsamplers" else rest
        else:
            block, rest = int(parts[1]), parts[4:]
            number = 2 * block + (1 if parts[2] == "upsamplers" else int(parts[3]))
            index = {"resnets": 0, "attentions": 1, "upsamplers": 2 if block == 0 else 1}[parts[2]]
            place = f"output_blocks.{number}.{index}"
        rest = [_RESNET.get(part, part) for part in rest] if "resnets" in parts else rest
        return ".".join([place, *rest])
    for old, new in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def original_vae_name(name: str) -> str:
    for old, new in _VAE_NAMES.items():
        name = name.replace(old, new)
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    return re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{3 - int(found[1])}", name)


def save_single_file(folder: Path, file: Path) -> Path:
    """The weights of the tiny Stable Diffusion in one file, under the names of the original."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors[f"model.diffusion_model.{original_unet_name(name)}"] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        is_matrix = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        original = f"first_stage_model.{original_vae_name(name)}"
        tensors[original] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    save_file(tensors, file)
    return file


def config_only(folder: Path, target: Path) -> Path:
    """A copy of a pipeline's folder without its weights."""
    copy_pipeline(folder, target)
    for path in target.rglob("*.safetensors"):
        path.unlink()
    return target


def made(folder: Path, parts: Parts | None = None) -> np.ndarray:
    return pixels(Backend(resolve(str(folder)), SETTINGS, parts=parts).generate(requests(2), SIDE, SIDE))


# ---- one file


def test_a_model_in_one_file_makes_the_pictures_of_its_folder(tiny_sd: Path, tmp_path: Path) -> None:
    file = save_single_file(tiny_sd, tmp_path / "my-model.safetensors")
    config = config_only(tiny_sd, tmp_path / "config")
    source = Backend.find(str(file), None, None, str(config))
    assert source.name == "my-model.safetensors" and source.revision.startswith("local-")
    assert source.config is not None and source.config.name == "config"
    backend = Backend(source, SETTINGS)
    assert np.array_equal(pixels(backend.generate(requests(2), SIDE, SIDE)), made(tiny_sd))
    assert Backend.find(str(file), source.revision, None, str(config)) == source
    with pytest.raises(InfrastructureError, match="has no other revision"):
        Backend.find(str(file), "main", None, str(config))


def test_a_file_without_its_configuration_says_what_to_do(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = save_single_file(tiny_sd, tmp_path / "my-model.safetensors")
    with pytest.raises(InfrastructureError, match=r"give --config with a folder .*HF_HUB_OFFLINE is set") as caught:
        Backend.find(str(file), None, None)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in str(caught.value) and "\n" not in str(caught.value)


def test_the_configuration_in_the_hubs_cache_is_enough(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    config_only(tiny_sd, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    file = save_single_file(tiny_sd, tmp_path / "my-model.safetensors")
    source = Backend.find(str(file), None, None)
    assert source.config is not None and source.config.revision == commit
    assert type(load_pipeline(source, "float32", "cpu")).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"x", "is a pickle; only safetensors are loaded"),
        ("model.safetensors", b"x" * 100, "damaged weights|cannot be loaded"),
        ("absent.safetensors", None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_model_is_one_clear_line(
    name: str, content: bytes | None, message: str, tiny_sd: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for config in (None, str(tiny_sd)):
        with pytest.raises(InfrastructureError, match=message) as caught:
            load_pipeline(Backend.find(str(tmp_path / name), None, None, config), "float32", "cpu")
        assert "\n" not in str(caught.value)


def test_a_configuration_that_is_none_or_not_needed_is_told(tiny_sd: Path, tmp_path: Path) -> None:
    file = save_single_file(tiny_sd, tmp_path / "my-model.safetensors")
    with pytest.raises(InfrastructureError, match=r"--config .*: not a diffusers pipeline"):
        Backend.find(str(file), None, None, str(tmp_path))
    with pytest.raises(UsageError, match=r"--config .*: is for a --model that is one file"):
        Backend.find(str(tiny_sd), None, None, str(tiny_sd))
    config = config_only(tiny_sd, tmp_path / "config")
    index = json.loads((config / "model_index.json").read_text())
    (config / "model_index.json").write_text(json.dumps({**index, "_class_name": "os.system"}))
    with pytest.raises(InfrastructureError, match=r"diffusers has no pipeline 'os.system'"):
        load_pipeline(Backend.find(str(file), None, None, str(config)), "float32", "cpu")


def test_a_file_that_lacks_a_part_takes_it_from_the_configurations_folder(tiny_sd: Path, tmp_path: Path) -> None:
    """Files of FLUX hold the transformer alone."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(save_single_file(tiny_sd, tmp_path / "whole.safetensors"))
    file = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "text_model" not in name}, file)
    pictures = Backend(Backend.find(str(file), None, None, str(tiny_sd)), SETTINGS).generate(requests(2), SIDE, SIDE)
    assert np.array_equal(pixels(pictures), made(tiny_sd))
    config = config_only(tiny_sd, tmp_path / "config")
    with pytest.raises(InfrastructureError, match=r"text_encoder.* whole pipeline") as caught:
        load_pipeline(Backend.find(str(file), None, None, str(config)), "float32", "cpu")
    assert "\n" not in str(caught.value)


# ---- LoRAs


@pytest.fixture(scope="module")
def lora(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 for the UNet's attention, in the layout that training scripts save."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator) / 20
    file = tmp_path_factory.mktemp("loras") / "style.safetensors"
    save_file(tensors, file)
    return file


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


@needs_peft
def test_a_lora_changes_the_pictures_by_its_scale(tiny_sd: Path, lora: Path) -> None:
    plain = made(tiny_sd).astype(int)
    half, whole, twice = (
        made(tiny_sd, find_parts([f"{lora}:{scale}" if scale else str(lora)], None, None)).astype(int)
        for scale in ("0.5", "", "2")
    )
    changed = [np.abs(pictures - plain).mean() for pictures in (half, whole, twice)]
    assert 0 < changed[0] < changed[1] < changed[2]
    both = made(tiny_sd, find_parts([f"{lora}:0.5", f"{lora}:1.5"], None, None)).astype(int)
    assert np.abs(both - twice).max() <= 2, "several are added up"


def test_a_lora_of_a_distilled_model_needs_few_steps(tmp_path: Path) -> None:
    """Nothing else says that a picture takes fifty steps of which four are enough."""
    (tmp_path / "sdxl_lightning_4step_lora.safetensors").touch()
    values = [f"{tmp_path}/sdxl_lightning_4step_lora.safetensors:1", "org/house-style:style.safetensors:0.5"]
    [line] = few_steps_warnings(values, 50)
    assert (
        line.startswith("--lora sdxl_lightning_4step_lora.safetensors: by its name it needs few steps") and "50" in line
    )
    assert few_steps_warnings(values, 4) == []


@needs_peft
def test_a_lora_for_another_model_is_told(lora: Path, tmp_path: Path) -> None:
    save_tiny_flux(tmp_path / "flux")
    with pytest.raises(InfrastructureError, match=r"--lora style.safetensors: .*FluxPipeline"):
        made(tmp_path / "flux", find_parts([str(lora)], None, None))


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_a_lora_without_its_package_is_told(tiny_sd: Path, lora: Path) -> None:
    with pytest.raises(InfrastructureError, match="--lora: needs the package peft: pip install peft"):
        made(tiny_sd, find_parts([str(lora)], None, None))


def test_what_a_lora_is_recorded_as(lora: Path, tmp_path: Path) -> None:
    copy = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    copy.parent.mkdir()
    copy.write_bytes(lora.read_bytes())
    (copy.parent / "optimizer.safetensors").write_bytes(b"")
    [one], [two] = (find_parts([value], None, None).record()["lora"] for value in (f"{lora}:-0.5", str(copy.parent)))
    assert (one["name"], one["scale"], two["name"], two["scale"]) == ("style.safetensors", -0.5, "folder", 1.0)
    assert one["digest"] == two["digest"], "the content, wherever it lies"
    assert Parts().record() == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("org/name:file.safetensors", ("org/name:file.safetensors", 1.0)),
        ("org/name@v1:file.safetensors:-1e-1", ("org/name@v1:file.safetensors", -0.1)),
        ("a:nan", None),
        ("a:inf", None),
        ("a:0", None),
        ("a:11", None),
    ],
)
def test_the_scale_of_a_lora(value: str, expected: tuple[str, float] | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match="the scale behind the colon must be between -10 and 10, and not 0"):
            lora_parts(value)
    else:
        assert lora_parts(value) == expected


def test_a_lora_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(InfrastructureError, match="is no file of safetensors"):
        find_parts([str(tmp_path / "a.bin")], None, None)
    with pytest.raises(InfrastructureError, match="has no safetensors"):
        find_parts([str(tmp_path)], None, None)
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(InfrastructureError, match=r"has 2 files of safetensors.*name one file"):
        find_parts([str(tmp_path)], None, None)


# ---- autoencoders


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, AutoencoderTiny

    from curation.backends.generate.tiny import fill_with_noise

    folder = tmp_path_factory.mktemp("vaes")
    small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    kl = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, **blocks}
    made = {
        "tiny": AutoencoderTiny(**small),
        "kl": AutoencoderKL(**kl, latent_channels=4),
        "kl-of-sdxl": AutoencoderKL(**kl, latent_channels=4, scaling_factor=0.13025),
        "kl-of-flux": AutoencoderKL(**kl, latent_channels=16),
        "shallow": AutoencoderTiny(
            **dict.fromkeys(small, (8,) * 3), num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)
        ),
    }
    for seed, (name, vae) in enumerate(made.items()):
        fill_with_noise(vae, seed)
        vae.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_another_vae_decodes_the_pictures(name: str, tiny_sd: Path, vaes: Path) -> None:
    parts = find_parts([], str(vaes / name), None)
    assert parts.record()["vae"]["name"] == name
    pictures = made(tiny_sd, parts)
    assert pictures.shape == (2, SIDE, SIDE, 3) and not np.array_equal(pictures, made(tiny_sd))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kl-of-flux", "decodes latents of 16 channels; this model's have 4"),
        ("kl-of-sdxl", r"is for other latents \(scaled by 0.13025; this model's are by 0.18215\); use --vae taesd"),
        ("shallow", "enlarges its latents 4 times; this model's need 8 times"),
    ],
)
def test_a_vae_for_other_latents_is_refused(name: str, message: str, tiny_sd: Path, vaes: Path) -> None:
    with pytest.raises(UsageError, match=message):
        made(tiny_sd, find_parts([], str(vaes / name), None))


def test_a_tiny_vae_of_another_model_is_refused_by_its_name(tiny_sd: Path, vaes: Path) -> None:
    """TAESD and TAESDXL have the same shapes."""
    for name, fits in (("madebyollin/taesd", True), ("madebyollin/taesdxl", False)):
        parts = Parts(vae=Part(name, vaes / "tiny", "local-x"))
        if fits:
            assert len(made(tiny_sd, parts)) == 2
        else:
            with pytest.raises(UsageError, match=r"use --vae taesd$"):
                made(tiny_sd, parts)


def test_what_is_no_vae_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="is no autoencoder of diffusers"):
        find_parts([], str(tmp_path), None)
    (tmp_path / "config.json").write_text('{"_class_name": "os.system"}')
    with pytest.raises(UsageError, match=r"'os.system'; .* takes AutoencoderTiny or AutoencoderKL"):
        made(tiny_sd, find_parts([], str(tmp_path), None))
    assert len(made(tiny_sd, find_parts([], str(tiny_sd), None))) == 2, "the VAE of a whole pipeline"


# ---- 8 bits


def test_eight_bits_where_they_cannot_be(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="needs --dtype bfloat16, not float32"):
        made(tiny_sd, Parts(quantize="fp8"))
    for there, message in ((None, "needs the package torchao: pip install torchao"), (object(), "needs a GPU")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
            with pytest.raises(InfrastructureError, match=message):
                check_fp8("bfloat16", "cpu")


def test_what_is_computed_in_eight_bits(tiny_sd: Path) -> None:
    pipeline = load_pipeline(resolve(str(tiny_sd)), "float32", "cpu")
    chosen = [name for name, module in pipeline.unet.named_modules() if is_large_matrix(module, name)]
    assert chosen and all(".attentions." in name for name in chosen)
    assert not any("time" in name or "norm" in name for name in chosen)
