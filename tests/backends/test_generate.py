"""Text to images with real diffusers pipelines of every architecture that has a preset, tiny, with random weights."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import backends
from curation.backends.generate.diffusers import Backend, Images, Request, SpeedUps
from curation.backends.generate.lettering import ELLIPSIS, wrapped, written_over
from curation.backends.generate.loading import load_pipeline
from curation.backends.generate.presets import Preset, preset_for, presets, says_few_steps
from curation.backends.generate.tiny import NAME as EMBEDDED
from curation.backends.generate.tiny import build_atomically, build_embedded, embedded_source, save_tiny_sd
from curation.errors import DeviceError, InfrastructureError, SampleError, Stopped, UsageError
from curation.generate.batches import seed_of
from curation.models.batch_size import FittingBatchSize, is_out_of_memory
from curation.models.hub_cache import ModelSource, public_name, resolve
from tests import ROOT
from tests.backends.tiny_pipelines import BUILDERS, save_sd_with_safety_checker

torch = pytest.importorskip("torch")

SIDE = 64


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline by name, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("pipelines")

    def find(name: str) -> Path:
        build_atomically(folder / name, BUILDERS[name])
        return folder / name

    return find


FLUX = "black-forest-labs/FLUX.1-schnell"


def open_backend(folder: Path, *, batch_size: int = 4, **more: Any) -> Backend:
    """The real loading path, on one thread, in float32, 64×64."""
    preset = preset_for(str(folder))[1]
    wanted = {name: more.pop(name) for name in ("steps", "guidance", "true_cfg_scale") if name in more}
    few = {} if preset.steps is None else {"steps": min(preset.steps, 9)}
    preset = replace(preset, height=SIDE, width=SIDE, dtype="float32", batch_size=batch_size, **few | wanted)
    kind: type[Backend] = backends.load("generate", "diffusers")
    return kind(resolve(str(folder)), preset, threads=1, **more)


def requests(count: int, first: int = 0) -> list[Request]:
    return [Request(f"a photo of person {i}", seed_of(0, str(i))) for i in range(first, first + count)]


def pixels(images: Images) -> np.ndarray:
    return np.stack([images.image(i) for i in range(len(images))])


def bare_pictures(backend: Backend, wanted: list[Request]) -> np.ndarray:
    """What diffusers itself makes of the same prompts and seeds, by its own way to PIL images."""
    images = backend.pipeline(
        **backend.call.arguments([request.prompt for request in wanted], len(wanted)),
        height=SIDE,
        width=SIDE,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in wanted],
    ).images
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("name", BUILDERS)
def test_pictures_are_those_of_the_bare_pipeline(name: str, tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny(name))
    wanted = requests(4)
    made = pixels(backend.generate(wanted, SIDE, SIDE))
    assert made.shape == (4, SIDE, SIDE, 3)
    assert np.array_equal(made, bare_pictures(backend, wanted))
    assert len({picture.tobytes() for picture in made}) == 4, "each sample has noise of its own"
    assert min(picture.std() for picture in made) > 20, "coloured noise, not a grey card"


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "tiny-Qwen-Image"])
def test_texts_encoded_ahead_give_the_same_pictures(name: str, tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny(name))
    wanted = requests(6)
    texts = backend.encode([request.prompt for request in wanted], at_once=6)
    assert texts is not None
    apart = pixels(backend.generate(wanted[2:6], SIDE, SIDE, texts.part(2, 4)))
    together = bare_pictures(backend, wanted[2:6])
    # SANA's attention mask and Z-Image's lists make rows independent; elsewhere a batch of six rounds another way
    assert np.abs(apart.astype(int) - together).max() <= 2
    same_batch = backend.encode([request.prompt for request in wanted[2:6]], at_once=4)
    assert np.array_equal(pixels(backend.generate(wanted[2:6], SIDE, SIDE, same_batch)), together)


def test_prompts_of_the_caller_are_left_alone(tiny: Callable[[str], Path]) -> None:
    """ZImagePipeline writes its chat template into the list that it is given."""
    backend = open_backend(tiny("tiny-Z-Image-Turbo"))
    prompts = ["one", "two"]
    backend.encode(prompts, at_once=2)
    backend.generate([Request(prompt, 1) for prompt in prompts], SIDE, SIDE)
    assert prompts == ["one", "two"]


def test_a_samples_noise_does_not_depend_on_its_batch(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    alone, among = (pixels(backend.generate(requests(count, first), SIDE, SIDE)) for count, first in ((1, 2), (4, 0)))
    assert np.abs(alone[0].astype(int) - among[2]).max() <= 2
    assert np.array_equal(among, pixels(backend.generate(requests(4), SIDE, SIDE))), (
        "the same batch repeats bit for bit"
    )


def test_seeds_are_a_hash_of_seed_and_key() -> None:
    seeds = {seed_of(seed, key) for seed in range(10) for key in ("a", "b", "ü", "\ud800", "00000/12")}
    assert len(seeds) == 50
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert seed_of(7, "000d6d31d370fcf64fcb4ce869c5ed96-0") == 5448843983979071595, "the same for ever"


# ---- memory


def limit_memory(
    backend: Backend, most: int, error: Callable[[], Exception], unless: Iterator[bool] | None = None
) -> list[int]:
    """Have the real pipeline run out of memory above ``most`` pictures; returns the batch sizes that were tried.

    unless: whether each such call fails, in order; all do by default.
    """
    fails = itertools.repeat(True) if unless is None else unless
    real, tried = type(backend.pipeline).__call__, []

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(kwargs["generator"])
        tried.append(count)
        if count > most and next(fails):
            raise error()
        return real(self, *args, **kwargs)

    backend.pipeline.__class__ = type(type(backend.pipeline).__name__, (type(backend.pipeline),), {"__call__": limited})
    return tried


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    backend = open_backend(tiny("tiny-sd"), batch_size=8, remember_in=tmp_path)
    halves = [pixels(backend.generate(requests(2, first), SIDE, SIDE)) for first in (0, 2, 4, 6)]
    tried = limit_memory(backend, 3, lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    made = pixels(backend.generate(requests(8), SIDE, SIDE))
    assert tried == [8, 4, 2, 2, 2, 2]
    assert np.array_equal(made, np.concatenate(halves))
    assert backend.batch.limit(SIDE, SIDE) == 2
    tried.clear()
    assert len(backend.generate(requests(3), SIDE, SIDE)) == 3
    assert tried == [2, 1], "the working size is remembered"
    assert backend.batch.limit(128, 128) == 8, "for this size of picture only"


def test_a_shortage_in_disguise_halves_the_batch_once(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    backend = open_backend(tiny("tiny-sd"), batch_size=8, remember_in=tmp_path)
    disguised = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    tried = limit_memory(backend, 4, lambda: RuntimeError(disguised))
    assert len(backend.generate(requests(8), SIDE, SIDE)) == 8
    assert tried == [8, 4, 4]
    other = open_backend(tiny("tiny-sd"), batch_size=8)
    tried = limit_memory(other, 3, lambda: RuntimeError(disguised))
    with pytest.raises(DeviceError, match="CUBLAS_STATUS_NOT_INITIALIZED"):
        other.generate(requests(8), SIDE, SIDE)
    assert tried == [8, 4]


def test_the_working_size_is_remembered_by_the_next_process(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    first = open_backend(tiny("tiny-sd"), batch_size=8, remember_in=tmp_path)
    limit_memory(
        first, 4, lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    first.generate(requests(8), SIDE, SIDE)
    assert open_backend(tiny("tiny-sd"), batch_size=8, remember_in=tmp_path).batch.limit(SIDE, SIDE) == 4
    assert open_backend(tiny("tiny-sd"), batch_size=2, remember_in=tmp_path).batch.limit(SIDE, SIDE) == 2
    assert open_backend(tiny("tiny-sdxl-turbo"), batch_size=8, remember_in=tmp_path).batch.limit(SIDE, SIDE) == 8
    for file in tmp_path.iterdir():
        file.write_bytes(b'{"batch_size": "four"}')
    assert FittingBatchSize(8, "cpu", tmp_path).limit(SIDE, SIDE) == 8, "a damaged record counts for nothing"


def test_one_picture_that_does_not_fit_ends_the_run(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    limit_memory(backend, 0, lambda: torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(InfrastructureError, match=r"one picture of 64×64 does not fit into memory \(cpu\)"):
        backend.generate(requests(4), SIDE, SIDE)


def test_texts_that_do_not_fit_are_encoded_in_parts(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend(tiny("tiny-FLUX.1-schnell"))
    prompts = [request.prompt for request in requests(5)]
    whole = backend.encode(prompts, at_once=2)
    real = backend.call.encode

    def limited(some: list[str]) -> Any:
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(some)

    monkeypatch.setattr(backend.call, "encode", limited)
    parts = backend.encode(prompts, at_once=5)
    assert whole is not None and parts is not None and parts.count == 5
    assert all(torch.equal(whole.values[name], parts.values[name]) for name in whole.values)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (UnboundLocalError("cannot access local variable 'image' where it is not associated with a value"), True),
        (UnboundLocalError("cannot access local variable 'latents'"), False),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_failing_gpu_ends_the_run_in_one_line_and_a_bug_keeps_its_traceback(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    limit_memory(
        backend, 0, lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with …")
    )
    with pytest.raises(DeviceError, match=r"failed: CUDA error: an illegal memory access was encountered$"):
        backend.generate(requests(1), SIDE, SIDE)
    broken = open_backend(tiny("tiny-sd"))
    limit_memory(broken, 0, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        broken.generate(requests(1), SIDE, SIDE)


# ---- bad pictures


def spoil(backend: Backend, row: int, value: float) -> None:
    """Have the pipeline's VAE give one picture of a batch in one value everywhere."""
    real = backend.pipeline.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        image = real(*args, **kwargs)[0]
        image[row] = value
        return (image,)

    backend.pipeline.vae.decode = decode


@pytest.mark.parametrize(
    ("value", "detail"), [(float("nan"), "not a number"), (-1.0, r"\(0, 0, 0\)"), (1.0, r"\(255, 255, 255\)")]
)
def test_a_blank_picture_is_refused_and_its_neighbours_are_not(
    value: float, detail: str, tiny: Callable[[str], Path]
) -> None:
    backend = open_backend(tiny("tiny-sd"))
    whole = pixels(backend.generate(requests(3), SIDE, SIDE))
    spoil(backend, 1, value)
    images = backend.generate(requests(3), SIDE, SIDE)
    with pytest.raises(SampleError, match=f"blank_image: .*{detail}"):
        images.image(1)
    assert np.array_equal(np.stack([images.image(0), images.image(2)]), whole[[0, 2]])


def test_a_single_pixel_that_is_not_a_number_is_refused(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    real = backend.pipeline.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        image = real(*args, **kwargs)[0]
        image[0, 0, 5, 5] = float("nan")
        return (image,)

    backend.pipeline.vae.decode = decode
    with pytest.raises(SampleError, match="blank_image"):
        backend.generate(requests(1), SIDE, SIDE).image(0)


def test_the_safety_checkers_verdict_is_a_reason(tmp_path: Path) -> None:
    save_sd_with_safety_checker(tmp_path / "checked-sd")
    images = open_backend(tmp_path / "checked-sd", steps=1, guidance=0.0).generate(requests(2), SIDE, SIDE)
    with pytest.raises(SampleError, match="flagged_by_safety_checker"):
        images.image(0)


# ---- what a pipeline takes


def test_a_negative_prompt_that_a_pipeline_does_not_take_is_an_error(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--negative_prompt: SanaSprintPipeline takes none"):
        open_backend(tiny("tiny-Sana_Sprint"), negative_prompt="blurry")


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-FLUX.1-schnell", "tiny-Z-Image-Turbo"])
def test_a_negative_prompt_that_would_be_ignored_is_told(name: str, tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny(name), negative_prompt="blurry")
    assert len(backend.call.warnings) == 1 and "has no effect" in backend.call.warnings[0]
    assert backend.call.negative_prompt == "", "the record does not claim one"


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl-turbo", "tiny-Z-Image-Turbo"])
def test_a_negative_prompt_has_an_effect_with_guidance(name: str, tiny: Callable[[str], Path]) -> None:
    plain = open_backend(tiny(name), guidance=5.0)
    negative = open_backend(tiny(name), guidance=5.0, negative_prompt="blurry")
    wanted = requests(2)
    made = pixels(negative.generate(wanted, SIDE, SIDE))
    assert not np.array_equal(made, pixels(plain.generate(wanted, SIDE, SIDE)))
    ahead = negative.encode([request.prompt for request in wanted], at_once=2)
    assert np.array_equal(made, pixels(negative.generate(wanted, SIDE, SIDE, ahead)))


def test_an_argument_that_a_pipeline_does_not_know_is_an_error(tiny: Callable[[str], Path]) -> None:
    """diffusers itself would log a warning and go on."""
    settings = Preset(model="x", height=SIDE, width=SIDE, dtype="float32", text_tokens=128)
    with pytest.raises(UsageError, match="StableDiffusionPipeline takes no max_sequence_length"):
        Backend(resolve(str(tiny("tiny-sd"))), settings)


@pytest.mark.parametrize(("name", "step"), [("tiny-sd", 8), ("tiny-FLUX.1-schnell", 16), ("tiny-Z-Image-Turbo", 16)])
def test_a_size_that_would_be_changed_quietly_is_an_error(name: str, step: int, tiny: Callable[[str], Path]) -> None:
    call = open_backend(tiny(name)).call
    assert call.size_multiple == step
    with pytest.raises(UsageError, match=rf"multiples of {step}; the nearest are --width 96 --height 64"):
        call.check_size(96 + step // 2 - 1, 64)


def test_a_model_without_a_preset_takes_its_pipelines_defaults(tiny: Callable[[str], Path]) -> None:
    name, preset = preset_for("somebody/unheard-of")
    assert name is None
    backend = Backend(resolve(str(tiny("tiny-sd"))), replace(preset, dtype="float32"))
    assert (backend.call.steps, backend.call.guidance) == (50, 7.5)
    assert (backend.call.width, backend.call.height) == (256, 256)


def test_other_steps_than_two_work_with_sana_sprint(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-Sana_Sprint"), steps=1)
    assert len(backend.generate(requests(1), SIDE, SIDE)) == 1


def test_stopping_between_steps(tiny: Callable[[str], Path]) -> None:
    backend, calls = open_backend(tiny("tiny-Z-Image-Turbo")), []

    def check_stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        backend.generate(requests(2), SIDE, SIDE, check_stop=check_stop)
    assert len(calls) == 3, "six of nine steps were spared"


# ---- speed-ups change no picture beyond rounding


@pytest.mark.parametrize("speed_ups", [SpeedUps(channels_last=True), SpeedUps(fuse_qkv=True)], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_speed_ups_change_only_the_rounding(name: str, speed_ups: SpeedUps, tiny: Callable[[str], Path]) -> None:
    plain, fast = open_backend(tiny(name)), open_backend(tiny(name), speed_ups=speed_ups)
    made = [pixels(backend.generate(requests(2), SIDE, SIDE)).astype(int) for backend in (plain, fast)]
    assert np.abs(made[0] - made[1]).max() <= 2


@pytest.mark.soak
@pytest.mark.parametrize("name", BUILDERS)
def test_compiling_changes_only_the_rounding(name: str, tiny: Callable[[str], Path]) -> None:
    plain, fast = open_backend(tiny(name)), open_backend(tiny(name), speed_ups=SpeedUps(compile="blocks"))
    made = [pixels(backend.generate(requests(6), SIDE, SIDE)).astype(int) for backend in (plain, fast)]
    assert np.abs(made[0] - made[1]).max() <= 2


def test_a_vae_that_is_computed_in_float32_is_told(tiny: Callable[[str], Path]) -> None:
    """SDXL's overflows in float16; Stable Diffusion's is left as it is."""
    told = []
    for name in ("tiny-sdxl-turbo", "tiny-sd"):
        settings = replace(preset_for(str(tiny(name)))[1], height=SIDE, width=SIDE, dtype="float16")
        told.append([line for line in Backend(resolve(str(tiny(name))), settings).call.warnings if "float16" in line])
    assert len(told[0]) == 1 and "--dtype bfloat16 avoids that" in told[0][0]
    assert told[1] == []


def test_the_last_batch_is_padded_to_a_fixed_size_when_compiled(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    expected = pixels(backend.generate([*requests(2), *requests(1, 1), *requests(1, 1)], SIDE, SIDE))[:2]
    backend.speed_ups = SpeedUps(compile="blocks")  # the padding alone: compiling takes half a minute
    tried = limit_memory(backend, 99, RuntimeError)
    assert np.array_equal(pixels(backend.generate(requests(2), SIDE, SIDE)), expected)
    texts = backend.encode([request.prompt for request in requests(2)], at_once=2)
    assert len(backend.generate(requests(2), SIDE, SIDE, texts)) == 2
    assert tried == [4, 4]


# ---- presets and names


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (FLUX, "flux.1-schnell"),
        ("stabilityai/sd-turbo", "sd-turbo"),
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "sana-sprint"),
        ("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", "sana-sprint-0.6b"),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "sana-1.5"),
        ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", "sana-1.5"),
        ("Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),
        ("Tongyi-MAI/Z-Image", "z-image"),
        ("black-forest-labs/FLUX.2-klein-4B", "flux.2-klein-4b"),
        ("black-forest-labs/FLUX.2-klein-9B", "flux.2-klein-9b"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "flux.2-klein-base-4b"),
        ("black-forest-labs/FLUX.2-klein-base-9B", "flux.2-klein-base-9b"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3.5-large-turbo"),
        ("stabilityai/stable-diffusion-3.5-large", None),
        ("Qwen/Qwen-Image", "qwen-image"),
        ("Qwen/Qwen-Image-2512", "qwen-image"),
        ("downloads/sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo"),
        ("/models/SDXL_Turbo_fp16/", "sdxl-turbo"),
        ("/models/sd-turbo/stable-diffusion-xl", None),
        ("/cache/models--stabilityai--sd-turbo/snapshots/0123456789012345678901234567890123456789", "sd-turbo"),
        ("black-forest-labs/FLUX.1-dev", None),
        ("somebody/notsd-turbo", None),
    ],
)
def test_presets_are_chosen_by_the_models_name(model: str, expected: str | None) -> None:
    name, preset = preset_for(model)
    assert name == expected
    assert preset is presets()[name] if name else preset == Preset(model=model)


@pytest.mark.parametrize(
    ("builder", "expected"),
    [
        ("tiny-FLUX.1-schnell", "flux.1-schnell"),
        ("tiny-FLUX.2-klein-4B", "flux.2-klein-4b"),
        ("tiny-Z-Image-Turbo", "z-image-turbo"),
        ("tiny-Sana_Sprint", "sana-sprint"),
        ("tiny-SANA1.5", "sana-1.5"),
        ("tiny-Qwen-Image", "qwen-image"),
        ("tiny-sdxl-turbo", None),
    ],
)
def test_a_folder_whose_name_says_nothing_has_the_preset_of_its_files(
    builder: str, expected: str | None, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny(builder))
    assert preset_for(str(tmp_path / "model"))[0] == expected
    assert preset_for("somebody/model", tmp_path / "model")[0] == expected, "a hub model's files"


def test_what_the_files_say_of_distillation_counts_more_than_the_name(tmp_path: Path) -> None:
    def described(name: str, is_distilled: object, layers: int = 5) -> str | None:
        (tmp_path / name / "transformer").mkdir(parents=True, exist_ok=True)
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": is_distilled}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        (tmp_path / name / "transformer" / "config.json").write_text(json.dumps({"num_layers": layers}))
        return preset_for(str(tmp_path / name))[0]

    assert described("FLUX.2-klein-4B", False) == "flux.2-klein-base-4b"
    assert described("FLUX.2-klein-base-9B", True) == "flux.2-klein-9b"
    assert described("FLUX.2-klein-9B", None) == "flux.2-klein-9b", "the name, where the files do not say"
    assert described("anything", True, 8) == "flux.2-klein-9b"
    assert described("anything", False, 5) == "flux.2-klein-base-4b"
    (tmp_path / "anything" / "model_index.json").write_bytes(b"[" * 100_000)
    assert preset_for(str(tmp_path / "anything"))[0] is None, "damaged files say nothing"


@pytest.mark.parametrize(
    ("model", "steps", "guidance"),
    [
        ("SG161222/RealVisXL_V4.0_Lightning", 4, 0.0),
        ("ByteDance/SDXL-Lightning-8step", 8, 0.0),
        ("/models/juggernautXL_hyper.safetensors", 8, 0.0),
        ("somebody/sd15-lcm", 4, 1.0),
        ("somebody/Hyper-SDXL-8steps-CFG", None, None),  # it keeps its guidance
        ("somebody/Hyper-FLUX", None, None),  # it has a guidance of its own
        ("somebody/hyperreal-sdxl", None, None),
    ],
)
def test_merges_with_a_distilled_model_are_known_by_name(model: str, steps: int | None, guidance: float | None) -> None:
    preset = preset_for(model)[1]
    assert (preset.steps, preset.guidance) == (steps, guidance)
    assert says_few_steps("somebody/Hyper-FLUX") and not says_few_steps("somebody/hyperreal-sdxl")


def test_qwen_image_guides_and_its_lightning_merge_does_not() -> None:
    preset = preset_for("Qwen/Qwen-Image")[1]
    assert (preset.steps, preset.true_cfg_scale) == (50, 4.0)
    preset = preset_for("lightx2v/Qwen-Image-Lightning-4steps")[1]
    assert (preset.steps, preset.true_cfg_scale) == (4, 1.0)


def test_qwen_image_guides_against_an_empty_negative_prompt_and_takes_another(tiny: Callable[[str], Path]) -> None:
    guided = open_backend(tiny("tiny-Qwen-Image"), steps=2)
    negative = open_backend(tiny("tiny-Qwen-Image"), steps=2, negative_prompt="blurry")
    plain = open_backend(tiny("tiny-Qwen-Image"), steps=2, true_cfg_scale=1.0)
    assert guided.call.true_cfg_scale == 4.0 and negative.call.negative_prompt == "blurry"
    assert guided.call.warnings == negative.call.warnings == []
    made = [pixels(backend.generate(requests(1), SIDE, SIDE)) for backend in (guided, negative, plain)]
    assert len({picture.tobytes() for picture in made}) == 3


def test_the_default_preset_is_the_published_datasets() -> None:
    preset = preset_for(FLUX)[1]
    assert (preset.steps, preset.guidance, preset.width, preset.height) == (2, 0.0, 384, 384)
    assert (preset.text_tokens, preset.batch_size, preset.dtype) == (256, 32, "bfloat16")


def test_a_folders_name_is_public_and_its_path_is_not() -> None:
    assert public_name("/home/me/secret project/flux-tuned/") == "flux-tuned"
    assert public_name("/c/models--org--name/snapshots/abc") == "org/name"
    assert public_name("org/name") == "org/name"


# ---- loading


def copy_pipeline(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def test_other_weights_under_the_same_name_are_another_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_pipeline(tiny("tiny-sd"), tmp_path / "tiny-sd")
    before = resolve(str(folder))
    assert before.revision == resolve(str(tiny("tiny-sd"))).revision, "wherever it lies"
    assert before.name == "tiny-sd" and str(tmp_path) not in before.name + before.revision
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    assert resolve(str(folder)).revision != before.revision


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/flux", "there is no such folder"),
        ("flux", "there is no such folder"),
        ("../flux", "there is no such folder"),
        ("", "there is no such folder"),
        (str(ROOT / "tests"), "not a diffusers pipeline"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_line(model: str, message: str) -> None:
    with pytest.raises(InfrastructureError, match=message) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_a_hub_model_without_a_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InfrastructureError, match="the hub does not answer") as caught:
        resolve(FLUX)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE is set"):
        resolve(FLUX)


def test_the_hubs_cache_is_enough(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    commit = "0123456789" * 4
    repository = tmp_path / "models--org--tiny-sd"
    snapshot = copy_pipeline(tiny("tiny-sd"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    source = ModelSource(name="org/tiny-sd", location="org/tiny-sd", revision=commit)
    assert resolve("org/tiny-sd") == source
    assert resolve("org/tiny-sd", revision=commit) == source
    assert resolve(str(snapshot)) == replace(source, location=str(snapshot))
    with pytest.raises(InfrastructureError, match="the hub does not answer"):
        resolve("org/tiny-sd", revision="../../refs/main")
    monkeypatch.chdir(tmp_path)
    assert type(load_pipeline(source, "float32", "cpu")).__name__ == "StableDiffusionPipeline"
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InfrastructureError, match="org/tiny-sd: cannot be loaded") as caught:
        load_pipeline(source, "float32", "cpu")  # a download that was cut short
    assert "\n" not in str(caught.value)


def test_a_folder_has_no_other_revision(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(InfrastructureError, match="has no other revision"):
        resolve(str(tiny("tiny-sd")), revision="v2")


def test_pickled_weights_are_never_read(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_pipeline(tiny("tiny-sd"), tmp_path / "tiny-sd")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(InfrastructureError, match=r"text_encoder/pytorch_model.bin is a pickle"):
        load_pipeline(resolve(str(folder)), "float32", "cpu")
    # These are no weights of the part: the pickle is still what would be read.
    for name in ("adapter_model.safetensors", "model.fp16.safetensors.aria2"):
        (folder / "text_encoder" / name).write_bytes(b"")
    with pytest.raises(InfrastructureError, match=r"text_encoder/pytorch_model.bin is a pickle"):
        load_pipeline(resolve(str(folder)), "float32", "cpu")
    weights.with_name("pytorch_model.bin").rename(weights.with_name("pytorch_model-00001-of-00002.bin"))
    with pytest.raises(InfrastructureError, match=r"pytorch_model-00001-of-00002.bin is a pickle"):
        load_pipeline(resolve(str(folder)), "float32", "cpu")


def test_a_whole_copy_of_a_repository_loads(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A clone of SDXL's repository has OpenVINO's and ONNX files, and a training run leaves its state: nobody opens
    these, in the folders of the parts and in others."""
    folder = copy_pipeline(tiny("tiny-sd"), tmp_path / "tiny-sd")
    for place in ("vae_decoder", "vae_encoder", "openvino", "checkpoint-500", "unet", "text_encoder", "vae", "."):
        (folder / place).mkdir(exist_ok=True)
        for name in ("openvino_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "model.onnx",
                     "flax_model.msgpack", "random_states_0.pkl"):  # fmt: skip
            (folder / place / name).write_bytes(b"\0" * 64)
    for place in ("unet", "vae"):
        (folder / place / "diffusion_pytorch_model.bin").write_bytes(b"\0" * 64)  # safetensors lie beside it
    (folder / "vae_decoder" / "pytorch_model.bin").write_bytes(b"\0" * 64)  # no part of the pipeline
    (folder / "scheduler" / "openvino_model.bin").write_bytes(b"\0" * 64)  # a part without weights
    assert type(load_pipeline(resolve(str(folder)), "float32", "cpu")).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("part", "spoil_it"),
    [
        ("vae/diffusion_pytorch_model.safetensors", lambda data: data[: len(data) // 2]),
        ("vae/diffusion_pytorch_model.safetensors", lambda data: b"\xff" * 100),
        ("unet/config.json", lambda data: b"{"),
        ("model_index.json", lambda data: data.replace(b"StableDiffusionPipeline", b"os.system")),
        ("model_index.json", lambda data: data.replace(b"StableDiffusionPipeline", b"DDPMPipeline")),
    ],
)
def test_a_damaged_model_is_one_clear_line(
    part: str, spoil_it: Callable[[bytes], bytes], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_pipeline(tiny("tiny-sd"), tmp_path / "tiny-sd")
    (folder / part).write_bytes(spoil_it((folder / part).read_bytes()))
    with pytest.raises(InfrastructureError) as caught:
        Backend(resolve(str(folder)), replace(presets()["tiny-sd"], model=str(folder)))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_model_may_not_bring_code(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_pipeline(tiny("tiny-sd"), tmp_path / "tiny-sd")
    (folder / "unet" / "evil.py").write_text("open('/tmp/evil', 'w')\nclass UNet: pass\n")
    index = folder / "model_index.json"
    told = index.read_text()
    index.write_text(told.replace('"diffusers",\n    "UNet2DConditionModel"', '"evil",\n    "UNet"'))
    assert index.read_text() != told
    with pytest.raises(InfrastructureError):
        load_pipeline(resolve(str(folder)), "float32", "cpu")
    assert not Path("/tmp/evil").exists()


# ---- the embedded pipeline


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_embedded_pipeline_has_the_same_bytes_wherever_it_is_built(tmp_path: Path) -> None:
    save_tiny_sd(tmp_path / "one")
    torch.manual_seed(99)
    save_tiny_sd(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_processes_may_build_the_embedded_pipeline_at_once(tmp_path: Path) -> None:
    code = (
        "from curation.backends.generate.tiny import build_embedded, embedded_source\n"
        "source = embedded_source()\nbuild_embedded(source)\nprint(source.location)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    builders = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    (folder,) = (Path(name) for name in folders)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}, "no half-built folder is left"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.rglob("*"))


def test_the_embedded_pipeline_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InfrastructureError, match="cannot be built"):
        build_embedded(replace(embedded_source(), location=str(blocked / "tiny-sd")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    private = Path(embedded_source().location)
    assert private.is_relative_to(tmp_path / f"curation-{os.getuid()}")
    (tmp_path / f"curation-{os.getuid()}").chmod(0o777)
    with pytest.raises(InfrastructureError, match="is not this user's alone"):
        embedded_source()


def test_the_embedded_pipeline_writes_each_prompt_over_its_picture() -> None:
    """The same picture in any batch and at any place in it, but for rounding, which depends on the kind of CPU; and the
    picture under the type is the pipeline's own."""
    source = embedded_source()
    build_embedded(source)
    preset = replace(presets()[EMBEDDED], height=SIDE, width=SIDE, batch_size=4)
    backend = backends.load("generate", "tiny")(source, preset, threads=1)
    bare = Backend(source, preset, threads=1)
    wanted = [Request("A photo of a nurse", 1), Request("A photo of a farmer", 1), *requests(3)]
    made = pixels(backend.generate(wanted, SIDE, SIDE))
    assert len(made) == 5
    differs = np.abs(made[2:].astype(int) - pixels(backend.generate(wanted[2:], SIDE, SIDE)))
    assert differs.max() <= 1 and (differs > 0).mean() < 0.01, "batches of 4 and 1, and of 3"
    texts = backend.encode([request.prompt for request in wanted], at_once=4)
    assert np.array_equal(made[:4], pixels(backend.generate(wanted[:4], SIDE, SIDE, texts.part(0, 4))))
    for picture, under, request in zip(made, pixels(bare.generate(wanted, SIDE, SIDE)), wanted, strict=True):
        assert np.array_equal(picture, written_over(under, "stand-in", request.prompt))
        assert np.array_equal(picture[-16:], under[-16:]), "the noise stays below the type"
        prompt = picture[12:22]  # below the title
        assert np.median(prompt) < 60 < 180 < prompt.max(), "light type on a dark ground"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "مرحبا بالعالم שלום",
        "日本語の写真" * 80,
        "\U0001f469\U0001f3ff\u200d\U0001f680 cafe\u0301",
        "\ud800\x00\x1b[31m a\nb\u202ec\u2028",
        "\u0301" * 3000,
        "\ufdfa" * 3000,  # one character that stands for eighteen
        "\U0010ffff",
    ],
)
def test_any_text_can_be_written_over_a_picture_of_any_size(text: str) -> None:
    for width, height in ((64, 64), (8, 8), (8, 200), (200, 8), (256, 256)):
        noise = np.full((height, width, 3), 77, np.uint8)
        picture = written_over(noise, "stand-in", text)
        assert picture.shape == noise.shape and picture.dtype == np.uint8
        assert np.array_equal(picture, written_over(noise, "stand-in", text))
        assert (noise == 77).all(), "the caller's picture is left alone"


def test_a_text_is_wrapped_to_the_picture_and_ends_with_an_ellipsis_where_it_is_cut() -> None:
    short = "A photo of a tall woman in a red coat – at the café"
    assert " ".join(wrapped(short, 256, 256)) == "A photo of a tall woman in a red coat - at the cafe"
    assert max(map(len, wrapped(short, 256, 256))) < 40
    whole = wrapped("Rindfleischetikettierungsueberwachungsaufgaben", 128, 256)
    assert "".join(whole) == "Rindfleischetikettierungsueberwachungsaufgaben" and len(whole) > 1
    cut = wrapped("word " * 1000, 256, 256)
    assert cut[-1].endswith(ELLIPSIS) and set(" ".join(cut).rstrip(ELLIPSIS).split()) <= {"word", "wor", "wo", "w"}
    assert len(cut) == len(wrapped("word " * 300, 256, 256)) > 8, "as many lines as there is room for"
