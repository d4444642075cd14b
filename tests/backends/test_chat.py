"""Captioners of many types by one file: each named model at tiny size; what type, template and bits say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from curation import backends
from curation.backends.caption import reasoning
from curation.caption.batching import caption_batch
from curation.caption.captioner import resolve
from curation.errors import InfrastructureError, UsageError
from curation.models.batch_size import FittingBatchSize
from curation.models.hub_cache import hub_config
from curation.replies import CAPTION, CUT, WHOLE, Attempt, Reply, judge
from tests import ROOT
from tests.backends.conftest import FIELDS, no_value_breaks_out, open_captioner

pytest.importorskip("transformers")

from tests.backends.tiny_captioners import CHAT
from tests.backends.tiny_chat import PUBLISHED, save_chat

FAMILIES = backends.families("caption")
NAMED = {model.model_type: model for model in PUBLISHED}


def of_one_shape(prepared: Sequence[Any]) -> list[Any]:
    shapes = [one.shape for one in prepared]
    return [one for one in prepared if one.shape == max(shapes, key=shapes.count)][:3]


# ---- each named model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*NAMED, "qwen3_vl_moe", "qwen3_5_moe"])
def test_a_named_model_opens_and_captions(
    model_type: str, folder: Callable[[str], Path], photos: list[Any], tmp_path: Path
) -> None:
    """A batch says what one by one says, the image has a part in it, and no code of the folder runs."""
    if model_type in NAMED:
        path = tmp_path / "model"
        save_chat(NAMED[model_type], path)
    else:
        path = Path(shutil.copytree(folder(model_type), tmp_path / "model"))
    marker = tmp_path / "ran"
    (path / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        settings = json.loads((path / name).read_bytes())
        kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
        settings["auto_map"] = dict.fromkeys(kinds, "modeling_own.Own")
        (path / name).write_text(json.dumps(settings))
    backend = open_captioner(path, max_tokens=6)
    assert backend.family.name == ("chat" if model_type in NAMED else "qwen")
    batch = of_one_shape([backend.prepare(photo) for photo in photos])
    assert len(batch) >= 2
    together = backend.caption(batch, [1, 2, 3][: len(batch)])
    assert together == [backend.caption([one], [seed])[0] for one, seed in zip(batch, (1, 2, 3), strict=False)]
    assert together == backend.caption(batch[::-1], [3, 2, 1][-len(batch) :])[::-1]
    first, second = (backend.model(**one.tensors).logits[0, -1] for one in batch[:2])
    assert not bool((first == second).all()), "the image has no part in what is said"
    no_value_breaks_out(open_captioner(path, **FIELDS), photos[0])
    assert not marker.exists(), "code from the model's folder was run"


def test_gemma_3n_says_which_package_its_image_encoder_needs(tmp_path: Path) -> None:
    """Its encoder is one of the package timm, which needs torchvision."""
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n"}))
    with pytest.raises(InfrastructureError, match=r"needs the package timm: .*pip install timm"):
        open_captioner(tmp_path)


# ---- the family


def test_the_type_decides_for_a_folder_and_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub whose config.json is in the hub's cache: its name says nothing, or something wrong."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    expected = {"gemma4": "chat", "paligemma": "paligemma", "qwen3_vl_moe": "qwen", "smolvlm": "smolvlm"}
    for number, (model_type, family) in enumerate(expected.items()):
        model = f"somebody/gemma-3-{number}"
        commit = f"{number}" * 40
        cache = tmp_path / f"models--{model.replace('/', '--')}"
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
        (snapshot / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert resolve(model, FAMILIES) == (FAMILIES[family], model)
        assert resolve(str(snapshot), FAMILIES) == (FAMILIES[family], str(snapshot))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "blip"}))
    hub_config.cache_clear()
    for name in (model, str(snapshot)):
        with pytest.raises(InfrastructureError, match=r"its model_type is 'blip'; the families here load .*gemma4"):
            resolve(name, FAMILIES)


def test_the_docs_say_what_came_of_each_type() -> None:
    """Every type of transformers for image and text is in one row, and the first two rows are what the families say."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    page = (ROOT / "docs" / "stage-05.md").read_text("utf-8")
    table = page.partition("| what came of it | types |")[2].partition("\n\n")[0]
    found = [re.findall(r"`([^`]+)`", line.rpartition("| ")[2]) for line in table.splitlines()[2:]]
    names = [name for row in found for name in row]
    assert len(set(names)) == len(names) and set(names) == set(KNOWN)
    assert sorted([*found[0], *found[2]]) == sorted(FAMILIES["chat"].model_types)
    special = {kind for family in FAMILIES.values() if not family.general for kind in family.model_types}
    assert special & set(KNOWN) == set(found[1])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("google/gemma-4-E4B-it", "chat"),
        ("google/gemma-3n-E4B-it", "chat"),
        ("google/gemma-3-4b-it", "gemma3"),
        ("google/paligemma2-3b-mix-448", "paligemma"),
        ("google/paligemma-3b-mix-448", "paligemma"),
        ("Qwen/Qwen3.5-9B", "qwen"),
        ("Qwen/Qwen3-VL-30B-A3B-Thinking", "qwen"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "qwen"),
        ("OpenGVLab/InternVL3_5-8B-HF", "chat"),
        ("allenai/Molmo2-8B", "chat"),
        ("openbmb/MiniCPM-V-4_6", "chat"),
        ("LiquidAI/LFM2-VL-1.6B", "chat"),
        ("zai-org/GLM-4.5V", "chat"),
        ("zai-org/GLM-4.1V-9B-Thinking", "chat"),
        ("lmms-lab/LLaVA-OneVision-1.5-8B-Instruct", None),
        ("moondream/moondream3-preview", None),
        ("OpenGVLab/InternVL3_5-8B", None),
    ],
)
def test_a_name_decides_where_the_hub_is_not_at_hand(
    name: str, family: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if family is None:
        with pytest.raises(InfrastructureError, match=r"does not give its config\.json"):
            resolve(name, FAMILIES)
    else:
        assert resolve(name, FAMILIES)[0].name == family


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHAT.replace("IMAGE", "<|image|>"), "<|image|>"),
        ("{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% endfor %}", "<|image|>"),
        ("{{ messages[0].content[1].text }}", None),
        ("{{ raise_exception('no list, no text') }}", None),
    ],
)
def test_the_question_is_put_as_the_template_wants_it(template: str, found: str | None, tmp_path: Path) -> None:
    save_chat(NAMED["glm4v"], tmp_path, template)
    if found is None:
        with pytest.raises(InfrastructureError, match="chat template takes no image"):
            open_captioner(tmp_path)
        return
    backend = open_captioner(tmp_path, max_tokens=4)
    assert backend.wordings[0].text.count(found) == 1 and backend.asked in backend.wordings[0].text


# ---- checkpoints that think


def thinking(template: str, folder: Callable[[str], Path], tmp_path: Path, name: str = "model", **settings: Any) -> Any:
    path = Path(shutil.copytree(folder("qwen3_vl"), tmp_path / name))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    (path / "chat_template.jinja").write_text(template.replace("IMAGE", mark))
    return open_captioner(path, max_tokens=4, **settings)


ALWAYS = CHAT.replace("assistant\n", "assistant\n<think>\n")
SWITCH = CHAT.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)


def replies(backend: Any, text: str, ended: str) -> Any:
    """What the judge says where the model has written ``text``."""
    [said] = backend._decoded([backend.processor.tokenizer.encode(text, add_special_tokens=False)])
    return judge(Reply(said, ended), CAPTION, asked=backend.asked)


def test_a_thinking_checkpoint_is_told_by_its_template(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Qwen3-VL-…-Thinking: the template opens the thought, so that the reply alone does not show it."""
    backend = thinking(ALWAYS, folder, tmp_path)
    assert backend.wordings[0].thought_tokens == reasoning.THOUGHT_TOKENS
    assert replies(backend, "They want a caption.\n</think>\n\nA red kite.", WHOLE).text == "A red kite."
    cut = replies(backend, "They want a caption. The kite is red.", CUT)
    assert (cut.text, cut.reason, cut.cut) == (None, "reply_only_reasoning", True), "a thought is no caption"
    prompt = thinking(ALWAYS, folder, tmp_path, "asked", prompt="Describe it; write no <think> tag.")
    assert prompt.wordings[0].begun == "<think>"


def test_thinking_is_turned_off_where_the_template_can(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("Model-9B", "Model-9B-Thinking"):
        backend = thinking(SWITCH, folder, tmp_path, name)
        assert backend.wordings[0].text.endswith("<think>\n\n</think>\n\n")
        assert backend.wordings[0].thought_tokens == 0
        assert replies(backend, "A red kite.", WHOLE).text == "A red kite."


def test_a_thinking_checkpoint_is_told_by_its_name(
    folder: Callable[[str], Path], tmp_path: Path, photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-4.1V-9B-Thinking: the model itself opens the thought.  It has room for it beside the caption's tokens."""
    monkeypatch.setattr(reasoning, "THOUGHT_TOKENS", 8)
    backend = thinking(CHAT, folder, tmp_path, "GLM-4.1V-9B-Thinking", temperature=1.0)
    assert replies(backend, "<think>It is red.</think><answer>A red kite.</answer>", WHOLE).text == "A red kite."
    assert replies(backend, "<think>It is red.", CUT).reason == "reply_only_reasoning"
    asked: list[int] = []
    generate = backend.model.generate

    def counted(**given: Any) -> Any:
        asked.append(given["generation_config"].max_new_tokens)
        return generate(**given)

    monkeypatch.setattr(backend.model, "generate", counted)
    batch = [backend.prepare(photos[0])]
    backend.caption(batch, [1])
    backend.caption(batch, [1], Attempt(longer=True))
    assert asked == [4 + 8, 2 * (4 + 8)]
    assert thinking(CHAT, folder, tmp_path, "Qwen3-VL-8B-Instruct").wordings[0].thought_tokens == 0


def test_a_thought_that_never_ends_fails_its_sample(
    folder: Callable[[str], Path], tmp_path: Path, photos: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasoning, "THOUGHT_TOKENS", 4)
    backend = thinking(ALWAYS, folder, tmp_path)
    [verdict] = caption_batch(backend, FittingBatchSize(1, "x"), [backend.prepare(photos[0])], [1])
    assert verdict.reason == "reply_only_reasoning"  # type: ignore[union-attr]


def test_marks_of_reasoning_that_are_special_tokens_are_kept_until_it_is_cut() -> None:
    """Gemma 4's and gpt-oss's: decoding without special tokens would leave the thought as if it were the caption."""
    from tests.backends.tiny_captioners import _chat_tokenizer

    tokenizer = _chat_tokenizer("<|channel>", "<channel|>", "<|channel|>", "<|message|>", "<|turn>")
    marks = reasoning.special_marks(tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(sorted(marks))) == {
        "<|channel>",
        "<channel|>",
        "<|channel|>",
        "<|message|>",
    }
    for text in (
        "<|channel>thought\nIt is red.<channel|>A red kite.<|turn>",
        "<|channel|>analysis<|message|>It is red.<|channel|>final<|message|>A red kite.",
    ):
        rows = [tokenizer.encode(text, add_special_tokens=False)]
        [said] = reasoning.decoded(tokenizer, rows, marks)
        assert judge(Reply(said), CAPTION).text == "A red kite."
        assert "red.A" in tokenizer.batch_decode(rows, skip_special_tokens=True)[0].replace("final", ""), (
            "why it is needed"
        )


@pytest.mark.parametrize(
    ("template", "off"),
    [
        ("{% if enable_thinking %}<think>{% endif %}", {"enable_thinking": False}),
        ("{%- set x = thinking|default(true) -%}", {"thinking": False}),
        ("{{ message.thinking }}{{ message['enable_thinking'] }} enable_thinking", {}),
        ("{{ 'thinking' }}", {}),
    ],
)
def test_the_switches_of_a_template(template: str, off: dict[str, bool]) -> None:
    assert reasoning.switched_off(template) == off


# ---- weights in few bits


def with_bits(folder: Path, settings: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_fp8_checkpoint_captions_on_the_cpu(
    folder: Callable[[str], Path], photos: list[Any], tmp_path: Path
) -> None:
    """Weights in 8 bits with a scale for each block, as Qwen's -FP8 have them; without a GPU they are widened."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    plain = open_captioner(folder("qwen3_vl"), max_tokens=6)
    path = Path(shutil.copytree(folder("qwen3_vl"), tmp_path / "fp8"))
    kept = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if "language_model.layers" in name and name.endswith("proj.weight"):
            scale = tensor.abs().max().float() / 448
            kept[name] = (tensor / scale).to(torch.float8_e4m3fn)
            kept[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            kept[name] = tensor
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with_bits(path, {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["visual"]})
    backend = open_captioner(path, max_tokens=6)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    found, expected = (dict(one.model.named_parameters())[name] for one in (backend, plain))
    assert torch.allclose(found, expected, rtol=0.07, atol=0.01) and not torch.equal(found, expected)
    assert backend.caption([backend.prepare(photos[0])], [1])[0].text


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("auto-round", "auto-round")],
)
def test_a_missing_package_for_weights_in_few_bits_is_one_line(
    method: str, package: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = with_bits(Path(shutil.copytree(folder("qwen3_vl"), tmp_path / "few")), {"quant_method": method, "bits": 4})
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        with pytest.raises(
            InfrastructureError, match=rf"quantised \({method}\).* the package {package}: .*pip install {package}"
        ):
            open_captioner(path)
    with pytest.raises(UsageError, match="quantised already"):
        open_captioner(path, quantize="4bit")


# ---- attention


def test_windows_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL's encoder with the published windows and heads of 80 numbers; images of four proportions."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from curation.backends.caption.attention import attend_by_length

    torch.manual_seed(0)
    # patch_size, window_size, spatial_merge_size and heads of 1280 / 16 numbers are those of Qwen2.5-VL-7B-Instruct.
    vision = {"depth": 2, "hidden_size": 160, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "window_size": 112, "spatial_merge_size": 2, "fullatt_block_indexes": [1]}
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    text |= {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text)).eval()
    grid = torch.tensor([[1, 32, 32], [1, 32, 32], [1, 24, 42], [1, 34, 30]])
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    calls: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, *others: Any, **more: Any) -> Any:
        calls.append(tuple(query.shape))
        return attend(query, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for dtype in (torch.float32, torch.bfloat16):
        encoder = model.model.visual.to(dtype)
        encoder.config._attn_implementation = "sdpa"
        with torch.inference_mode():
            calls.clear()
            expected = encoder(pixels.to(dtype), grid_thw=grid).pooler_output
            before = len(calls)
            calls.clear()
            assert attend_by_length(model) == 2
            found = encoder(pixels.to(dtype), grid_thw=grid).pooler_output
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.02)
        windows = [call for call in calls if call[2] == 64]
        assert windows == [(59, 2, 64, 80)], "all full windows of all images"
        assert before > 70 and len(calls) <= 12, (before, calls)


def test_how_a_captioner_attends(folder: Callable[[str], Path], photos: list[Any]) -> None:
    texts = {}
    for attention in ("auto", "sdpa"):
        backend = open_captioner(folder("qwen2_5_vl"), max_tokens=6, attention=attention)
        assert backend.model.model.visual.config._attn_implementation.startswith("flash") == (attention == "auto")
        batch = of_one_shape([backend.prepare(photo) for photo in photos])
        texts[attention] = backend.caption(batch, [1] * len(batch))
    assert texts["auto"] == texts["sdpa"]
    with pytest.raises(UsageError, match="it needs a GPU"):
        open_captioner(folder("qwen2_5_vl"), attention="flash")
    with pytest.raises(
        InfrastructureError, match=r"--attention flash needs the package flash-attn: .*install flash-attn"
    ):
        if importlib.util.find_spec("flash_attn") is not None:
            pytest.skip("flash-attn is installed")
        open_captioner(folder("qwen2_5_vl"), attention="flash", device="cuda:0")


# ---- images without torchvision


def test_tensors_are_resized_padded_and_normalised_as_pillow_does() -> None:
    torch = pytest.importorskip("torch")
    import numpy as np
    from PIL import Image

    from curation.backends.caption import torchless

    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 80).convert("RGB")
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    for mode, by_pillow in ((torchless.InterpolationMode.BICUBIC, 3), (2, 2)):
        found = torchless.resize(pixels, (25, 40), mode)
        expected = np.asarray(image.resize((40, 25), by_pillow)).transpose(2, 0, 1)
        assert found.dtype == torch.uint8 and found.shape == (3, 25, 40)
        differences = np.abs(found.numpy().astype(int) - expected)  # Pillow rounds between the two directions
        assert differences.max() <= 3 and differences.mean() < 0.1
    with pytest.raises(ValueError, match="resized by lanczos, which needs torchvision"):
        torchless.resize(pixels, (25, 40), 1)
    padded = torchless.pad(pixels, (1, 2, 3, 4), fill=[7, 8, 9])
    assert padded.shape == (3, 66, 94) and padded[:, 0, 0].tolist() == [7, 8, 9]
    assert torch.equal(padded[:, 2:-4, 1:-3], pixels)
    normal = torchless.normalize(pixels.float(), [1.0, 2.0, 3.0], [2.0, 4.0, 8.0])
    assert torch.allclose(normal[2], (pixels[2].float() - 3) / 8)


def test_a_class_that_transformers_does_not_have_is_said() -> None:
    from curation.backends.caption import torchless

    if torchless.has_torchvision():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="no class NobodysProcessor"):
        torchless.find_class("NobodysProcessor")
    import sys

    torchless.find_class("Llama4ImageProcessor")
    assert "torchvision" not in sys.modules, "nothing else is to believe that torchvision is there"
