"""What pipelines read of a prompt, and which of them use a negative prompt."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from curation import backends
from curation.backends.generate.calls import PipelineCall, uses_negative_prompt
from curation.backends.generate.diffusers import Backend, Request
from curation.backends.generate.presets import Preset, preset_for
from curation.backends.generate.reading import beginning
from curation.backends.generate.tiny import build_atomically, t5_tokenizer
from curation.errors import UsageError
from curation.models.hub_cache import resolve
from tests.backends.tiny_pipelines import BUILDERS

torch = pytest.importorskip("torch")

SIDE = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline by name, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("pipelines")

    def find(name: str) -> Path:
        build_atomically(folder / name, BUILDERS[name])
        return folder / name

    return find


def open_backend(folder: Path, **more: Any) -> Backend:
    settings = {name: more.pop(name) for name in ("text_tokens", "guidance", "steps", "true_cfg_scale") if name in more}
    preset = replace(preset_for(str(folder))[1], height=SIDE, width=SIDE, dtype="float32", **settings)
    kind: type[Backend] = backends.load("generate", "diffusers")
    return kind(resolve(str(folder)), preset, **more)


def picture(backend: Backend, prompt: str) -> np.ndarray:
    return backend.generate([Request(prompt, 1)], SIDE, SIDE).image(0)


# ---- how much of a prompt is read


@pytest.mark.parametrize("name", BUILDERS)
def test_a_text_that_fits_is_read_to_its_last_token_and_a_longer_one_is_not(
    name: str, tiny: Callable[[str], Path]
) -> None:
    """The window is what the pipeline's pictures show it to be."""
    # a few tokens, so that one letter counts among the noise
    backend = open_backend(tiny(name), **({} if name in ("tiny-sd", "tiny-sdxl-turbo") else {"text_tokens": 120}))
    window = backend.window
    assert window is not None
    letters = "ab" * 1000
    length = next(n for n in range(1, 2000) if window.count([letters[: n + 1]])[0] > window.room)
    assert 10 < length < 121
    fits, other = letters[:length], letters[: length - 1] + "z"
    assert window.count([fits, other]) == [window.room, window.room]
    encoded = [backend.call.encode_prompt([text]) for text in (fits, other)]
    assert not same(*encoded), "the last token is read"
    if not window.after:  # a template's end is cut off before the prompt is
        encoded = [backend.call.encode_prompt([letters[: length - 1] + end]) for end in ("bab", "bzz")]
        assert same(*encoded), "what is behind it is not"


def same(first: Any, second: Any) -> bool:
    """Whether two results of encode_prompt are equal: tensors in tuples and lists."""
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first is second or torch.equal(first, second)


def test_the_encoder_that_reads_most_counts(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-FLUX.1-schnell"))
    assert backend.window is not None
    assert backend.window.room == 255, "T5 reads 256 tokens with its end mark; CLIP beside it reads 77"
    [reading] = backend.read(["a" * 200])
    assert not reading.is_cut


def test_the_tokenizers_are_what_they_were(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"))
    assert "__call__" not in vars(type(backend.pipeline.tokenizer)), "no longer watched"


def test_a_prompt_makes_room_for_its_suffix(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"), prompt_suffix=", film photography")
    prompts = ["short", "one two three " * 20, "x" * 500, "字" * 100]
    short, words, letters, signs = backend.read(prompts)
    assert (short.text, short.is_cut, short.shortened) == ("short, film photography", False, None)
    for prompt, reading in zip(prompts[1:], (words, letters, signs), strict=True):
        assert reading.text == f"{reading.shortened}, film photography"
        assert reading.shortened and prompt.startswith(reading.shortened)
        assert reading.given is not None and reading.read is not None and reading.read <= 75 < reading.given
    assert words.shortened is not None and words.shortened.split()[-1] in ("one", "two", "three")
    other = open_backend(tiny("tiny-sd"), prompt_suffix=", an oil painting!")
    texts = [b.read([prompts[1]])[0].text for b in (backend, other)]
    assert not np.array_equal(picture(backend, texts[0]), picture(backend, texts[1])), "the suffix arrives"


def test_a_suffix_that_cannot_arrive_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--prompt_suffix: it has 80 tokens, and StableDiffusionPipeline reads 75"):
        open_backend(tiny("tiny-sd"), prompt_suffix="," * 80)


def test_a_word_that_leaves_no_room_is_no_prompt(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"), prompt_suffix="," * 74)
    assert [reading.text for reading in backend.read(["a", "字字"])] == ["a" + "," * 74, ""]


def test_a_long_negative_prompt_is_told(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-sd"), guidance=5.0, negative_prompt="x" * 100)
    assert backend.call.warnings == ["--negative_prompt has 100 tokens; StableDiffusionPipeline reads the first 75"]


@pytest.mark.parametrize(
    ("length", "left"), [(3, "one"), (5, "one"), (7, "one two"), (6, "one"), (8, "one two"), (99, "one two, three")]
)
def test_a_beginning_ends_with_a_word(length: int, left: str) -> None:
    assert beginning("one two, three", length) == left


# ---- negative prompts


def text_to_image_pipelines() -> Iterator[type]:
    """Every pipeline of the installed diffusers that makes pictures of a text alone."""
    import diffusers
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    needed = {"prompt", "height", "width", "num_inference_steps", "generator", "output_type"}
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline")):
        kind = getattr(diffusers, name)
        if not isinstance(kind, type) or getattr(kind, "_backends", None):
            continue
        parameters = inspect.signature(kind.__call__).parameters
        required = {n for n, p in parameters.items() if p.default is p.empty and n not in ("self", "args", "kwargs")}
        of_text = not {"image", "num_frames"} & parameters.keys() or kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        if needed <= parameters.keys() and required <= {"prompt"} and of_text:
            yield kind


def bare(kind: type, time_cond: int | None = None) -> Any:
    """A pipeline without parts, but for what its property asks."""
    pipeline = kind.__new__(kind)
    config = SimpleNamespace(time_cond_proj_dim=time_cond)
    object.__setattr__(pipeline, "unet", SimpleNamespace(config=config))
    return pipeline


def told_by_source(kind: type, scales: dict[str, float]) -> bool | None:
    """What the pipeline's own code makes of the scales: the value of its (local) switch for guidance, read from its
    source; None where the source has no such line."""
    property_ = getattr(kind, "do_classifier_free_guidance", None)
    lines = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind.__call__))))  # type: ignore[operator]
    switches = ("do_true_cfg", "do_cfg", "do_classifier_free_guidance")
    found = {
        target.id: node.value
        for node in lines
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in switches
    }
    for switch in switches:
        if switch in found:
            names = {**scales, "has_neg_prompt": True}
            return bool(eval(ast.unparse(found[switch]), {"__builtins__": {}}, names))
    if isinstance(property_, property):
        body = ast.parse(textwrap.dedent(inspect.getsource(property_.fget))).body[0]  # type: ignore[arg-type]
        text = ast.unparse(body.body[-1].value)  # type: ignore[attr-defined]
        owner = SimpleNamespace(
            _guidance_scale=scales["guidance_scale"],
            unet=SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None)),
        )
        return bool(eval(text, {"__builtins__": {}}, {"self": owner}))
    return None


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 5.0])
@pytest.mark.parametrize("true_cfg", [1.0, 4.0])
def test_the_negative_prompt_is_dropped_only_where_the_pipeline_ignores_it(guidance: float, true_cfg: float) -> None:
    wrong, judged = [], 0
    for kind in text_to_image_pipelines():
        if "negative_prompt" not in inspect.signature(kind.__call__).parameters:  # type: ignore[operator]
            continue
        scales = {"guidance_scale": guidance, "true_cfg_scale": true_cfg}
        told = told_by_source(kind, scales)
        judged += told is not None
        if told is not None and uses_negative_prompt(bare(kind), dict(scales)) != told:
            wrong.append(kind.__name__)
    assert not wrong
    assert judged > 40


def test_where_nothing_tells_the_negative_prompt_is_passed_on() -> None:
    from diffusers import StableCascadeCombinedPipeline

    assert uses_negative_prompt(bare(StableCascadeCombinedPipeline), {"guidance_scale": None})


def test_a_model_that_reads_guidance_as_a_number_ignores_a_negative_prompt() -> None:
    from diffusers import StableDiffusionPipeline

    assert not uses_negative_prompt(bare(StableDiffusionPipeline, time_cond=256), {"guidance_scale": 7.5})


def tiny_pixart() -> Any:
    """A pipeline without the property do_classifier_free_guidance."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=2)
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def test_a_pipeline_without_the_property_gets_its_negative_prompt() -> None:
    settings = Preset(model="pixart", height=16, width=16, text_tokens=16, steps=2)
    pipeline = tiny_pixart()
    call = PipelineCall(pipeline, settings, "blurry")
    assert call.arguments(["p"], 1)["negative_prompt"] == ["blurry"] and not call.warnings
    call = PipelineCall(pipeline, replace(settings, guidance=1.0), "blurry")
    assert "negative_prompt" not in call.arguments(["p"], 1)
    assert call.warnings == ["--negative_prompt has no effect: PixArtSigmaPipeline ignores it at --guidance 1.0"]


def test_true_cfg_scale_has_an_effect_in_flux(tiny: Callable[[str], Path]) -> None:
    folder = tiny("tiny-FLUX.1-schnell")
    plain = open_backend(folder, negative_prompt="blurry")
    assert plain.call.warnings == ["--negative_prompt has no effect: FluxPipeline ignores it at --true_cfg_scale 1.0"]
    assert plain.call.true_cfg_scale is None, "the record does not claim one"
    guided = open_backend(folder, negative_prompt="blurry", true_cfg_scale=4.0)
    assert (guided.call.negative_prompt, guided.call.true_cfg_scale, guided.call.warnings) == ("blurry", 4.0, [])
    empty = open_backend(folder, true_cfg_scale=4.0)
    pictures = [picture(backend, "a person") for backend in (plain, guided, empty)]
    assert len({made.tobytes() for made in pictures}) == 3
    texts = guided.encode(["a person"], at_once=1)
    ahead = guided.generate([Request("a person", 1)], SIDE, SIDE, texts).image(0)
    assert np.array_equal(ahead, pictures[1]), "the negative prompt is not lost where prompts are encoded ahead"


def test_true_cfg_scale_that_a_pipeline_does_not_take_is_an_error(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="StableDiffusionPipeline takes no true_cfg_scale"):
        open_backend(tiny("tiny-sd"), true_cfg_scale=4.0)


def test_guidance_that_nothing_reads_is_told(tiny: Callable[[str], Path]) -> None:
    backend = open_backend(tiny("tiny-FLUX.1-schnell"), guidance=3.5)
    assert backend.call.warnings == ["--guidance 3.5 has no effect: FluxPipeline does not read it with this model"]
    assert not open_backend(tiny("tiny-Sana_Sprint"), guidance=3.5).call.warnings
    assert not open_backend(tiny("tiny-sd"), guidance=3.5).call.warnings
