"""CLIP, SigLIP and the heads on CLIP's features: against what OpenAI's preprocessing, open_clip and detoxify answer.

The references were recorded by tests/backends/extractor_references.py in an environment that has those packages.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from curation.backends.extract import clip, clip_head, pictures, toxicity
from curation.backends.extract import families as extractor_families
from curation.backends.extract.pictures import (
    OPENAI_MEAN,
    OPENAI_STD,
    CentreCrop,
    FastCentreCrop,
    Normalise,
    PatchGrid,
    patch_grid,
)
from curation.backends.extract.tokens import OPENCLIP_MARKS, ClipTokens
from curation.commands.tables.missing import how_to_make
from curation.errors import InfrastructureError, UsageError
from curation.extract import Catalogue, ExtractConfig
from curation.extract.api import order
from curation.extract.settings import ModelSettings
from curation.images import decode_rgb, encode_jpeg
from tests.backends import add_other_formats
from tests.backends import tiny_extractors as tiny
from tests.backends.tiny_extractors import SampleBatch

REFERENCES = json.loads((Path(__file__).resolve().parents[1] / "data" / "extractor_references.json").read_bytes())
OPENCLIP_CAPTIONS = ("<|endoftext|> a <end_of_text>", "<start_of_text>x<|startoftext|> the cat")
PICTURES = ((1, 300, 200), (2, 101, 333), (3, 640, 480), (4, 50, 700), (5, 224, 224))
TOXICITY_TEXTS = ("a photo of the cat", "", "you are 17 of \u00e9 things", "long " * 100)
B32, L14 = "oai-clip-vit-b32", "oai-clip-vit-l14"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_clip(folder / "clip")
    tiny.save_clip(folder / "large", width=768, seed=8)
    tiny.save_siglip(folder / "siglip")
    tiny.save_toxicity(folder / "toxicity")
    tiny.save_nsfw_head(folder / "nsfw.pt")
    tiny.save_aesthetic_head(folder / "aesthetic.pth")
    return folder


def settings(weights: Path | str, **more: Any) -> ModelSettings:
    return ModelSettings(weights=str(weights), **more)


def batch(count: int = len(PICTURES), **more: Any) -> SampleBatch:
    return SampleBatch([tiny.picture(*p) for p in PICTURES[:count]], list(tiny.CAPTIONS[:count]), **more)


# ---- pictures


def test_crops_are_openais_to_the_last_bit_on_210_sizes_and_six_modes() -> None:
    normalise = Normalise(OPENAI_MEAN, OPENAI_STD, "cpu", torch.float32)
    wrong = []
    for (mode, width, height, image), expected in zip(tiny.exact_pictures(), REFERENCES["crops"], strict=True):
        numbers = normalise(torch.from_numpy(CentreCrop().of(image).copy())[None])[0].numpy()
        if hashlib.sha256(numbers.tobytes()).hexdigest()[:16] != expected:
            wrong.append((mode, width, height))
    assert not wrong
    assert len(REFERENCES["crops"]) >= 200


def test_what_the_stage_decodes_is_what_pillow_decodes() -> None:
    for name, data in example_photos():
        own = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(CentreCrop()(decode_rgb(data)), CentreCrop()(own)), name


def example_photos() -> list[tuple[str, bytes]]:
    shard = sorted((Path(__file__).resolve().parents[2] / "examples" / "shards").glob("*.tar"))[1]
    with tarfile.open(shard) as tar:
        members = [m for m in tar if m.name.endswith(".jpg")][:20]
        return [(m.name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]


def test_a_picture_of_an_extreme_shape_is_cropped_as_if_it_were_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 900), (900, 1), (3, 2000), (2000, 3), (230, 700), (700, 230), (300, 900), (900, 300), (11, 8000)]
    crops = [tiny.picture(9, *shape) for shape in shapes]
    whole = [CentreCrop()(pixels) for pixels in crops]
    monkeypatch.setattr(pictures, "MAX_RESIZED_PIXELS", 0)
    for pixels, expected in zip(crops, whole, strict=True):
        difference = np.abs(CentreCrop()(pixels).astype(int) - expected)
        assert difference.max() <= 2, pixels.shape
        assert (difference > 0).mean() < 0.001, pixels.shape
    monkeypatch.undo()
    assert CentreCrop()(np.zeros((1, 20_000_000, 3), np.uint8)).shape == (224, 224, 3)  # in no more memory than itself


def test_preparations_travel_to_other_processes_and_equal_ones_are_one(models: Path) -> None:
    a = clip.Backend(B32, settings(models / "clip"))
    b = clip.Backend(L14, settings(models / "clip"))
    assert set(pickle.loads(pickle.dumps(a.preparations))) == set(b.preparations)
    assert len({*a.preparations, *b.preparations}) == 2


def test_the_fast_crop_is_near_the_exact_one(models: Path) -> None:
    exact = clip.Backend(B32, settings(models / "clip"))
    fast = clip.Backend(B32, settings(models / "clip", resize="fast"))
    assert isinstance(fast.preparations[0], FastCentreCrop)
    jpegs = [encode_jpeg(tiny.picture(seed, 900, 700), 95) for seed in range(3)]
    captions = ["a"] * 3
    whole = exact.compute(SampleBatch([decode_rgb(j) for j in jpegs], captions))[f"{B32}-image"]
    cheap = fast.compute(SampleBatch([decode_rgb(j, at_least=288) for j in jpegs], captions))[f"{B32}-image"]
    assert (whole * cheap).sum(1).min() > 0.99
    assert not torch.equal(whole, cheap)


# ---- captions


def test_tokens_are_openais(models: Path) -> None:
    tokens = ClipTokens(str(models / "clip"))
    for caption, expected in zip(tiny.CAPTIONS, REFERENCES["tokens"], strict=True):
        assert tokens(caption).tolist() == expected, caption
    assert tokens("x" * 500)[-1] == tiny.clip_vocabulary()["<|endoftext|>"]  # cut off, and ended


def test_the_marks_in_a_caption_are_the_marks_as_in_openais_own_pattern(models: Path) -> None:
    start, end = (tiny.clip_vocabulary()[mark] for mark in ("<|startoftext|>", "<|endoftext|>"))
    tokens = ClipTokens(str(models / "clip"))("<|endoftext|> a <|startoftext|>").tolist()
    assert tokens[:2] == [start, end]
    assert tokens[3:5] == [start, end]


def test_tokens_of_a_hostile_caption_are_77_integers_at_once(models: Path) -> None:
    tokens = ClipTokens(str(models / "clip"))
    for caption in ("\ud800 lone", "&" * 5_000_000, "&#0;&#x110000;", "\x00" * 100):
        assert tokens(caption).shape == (77,)


def test_tokenizer_json_gives_the_same_tokens(models: Path, tmp_path: Path) -> None:
    vocabulary = tiny.clip_vocabulary()
    model = {"type": "BPE", "vocab": vocabulary, "merges": [" ".join(pair) for pair in tiny.MERGES]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": model}))
    for caption in tiny.CAPTIONS:
        assert np.array_equal(ClipTokens(str(tmp_path))(caption), ClipTokens(str(models / "clip"))(caption))


# ---- features and scores


def test_features_and_scores_are_open_clips(models: Path) -> None:
    backend = clip.Backend(B32, settings(models / "clip"))
    found = backend.compute(batch())
    for name, expected in REFERENCES["clip"].items():
        assert np.abs(np.asarray(found[f"{B32}-{name}"]) - expected).max() < 1e-5, name
    assert np.allclose(np.linalg.norm(found[f"{B32}-image"], axis=1), 1, atol=1e-6)
    assert [feature.width for feature in backend.features] == [64, 64]
    assert found[f"{B32}-score"].max() <= 1  # no ×100


def test_any_clip_by_folder_has_its_own_size_and_a_short_name(tmp_path: Path) -> None:
    tiny.save_clip(tmp_path / "clip-tiny-patch16", side=64, patch=16, width=24)
    backend = clip.Backend(f"clip:{tmp_path / 'clip-tiny-patch16'}", ModelSettings())
    assert [f.name for f in backend.features] == ["clip-tiny-patch16-image", "clip-tiny-patch16-text"]
    assert backend.preparations[0] == CentreCrop(64)
    assert backend.compute(batch(2))["clip-tiny-patch16-image"].shape == (2, 24)


def test_a_whole_copy_of_a_repository_loads(models: Path, tmp_path: Path) -> None:
    """Other formats and a trainer's state beside the safetensors: nobody opens them."""
    copy = Path(shutil.copytree(models / "clip", tmp_path / "copy"))
    add_other_formats(copy)
    clip.Backend("clip:own", settings(copy))


def test_weights_saved_before_safetensors_load_and_are_told_apart(models: Path, tmp_path: Path) -> None:
    found = []
    for seed in (1, 8):
        folder = tmp_path / str(seed)
        tiny.save_clip(folder, seed=seed)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        backend = clip.Backend(B32, settings(folder))
        found.append((backend.revision, backend.compute(batch(2))[f"{B32}-score"].tolist()))
    safe = clip.Backend(B32, settings(models / "clip"))
    assert found[0][1] == safe.compute(batch(2))[f"{B32}-score"].tolist()
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_siglip_scores_as_its_own_model_does(models: Path) -> None:
    from transformers import AutoImageProcessor, SiglipModel

    pictures, captions = [tiny.picture(*p) for p in PICTURES[:2]], list(tiny.CAPTIONS[:2])
    backend = clip.Backend(f"siglip:{models / 'siglip'}", ModelSettings())
    found = backend.compute(SampleBatch(pictures, captions))
    folder = str(models / "siglip")
    model = SiglipModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    seen = processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = tokenizer(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        own = model(pixel_values=seen, input_ids=words)
    assert np.allclose(found["siglip-probability"], own.logits_per_image.sigmoid().diagonal(), atol=1e-5)
    assert np.allclose(found["siglip-score"], (own.image_embeds * own.text_embeds).sum(1), atol=1e-5)


def test_siglip_2_takes_pictures_in_their_own_shape(tmp_path: Path) -> None:
    """NaFlex: features, score and probability are those of its own model and processor, alone and in a batch."""
    from transformers import AutoImageProcessor, Siglip2Model

    folder = tiny.save_siglip2(tmp_path / "naflex")
    shapes = [*PICTURES, (6, 3, 900), (7, 900, 3), (8, 1, 1)]
    shown, captions = [tiny.picture(*p) for p in shapes], list(tiny.CAPTIONS[: len(shapes)])
    backend = clip.Backend(f"siglip:{folder}", ModelSettings())
    found = backend.compute(SampleBatch(shown, captions))
    model = Siglip2Model.from_pretrained(folder).eval()
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    seen = own(images=[Image.fromarray(p) for p in shown], return_tensors="pt", input_data_format="channels_last")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")  # as Google's checkpoints say it
    words = tokenizer(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    assert len({tuple(shape) for shape in seen["spatial_shapes"].tolist()}) >= 5
    with torch.inference_mode():
        expected = model(**seen, input_ids=words)
    assert np.allclose(found["naflex-image"], expected.image_embeds, atol=1e-5)
    assert np.allclose(found["naflex-probability"], expected.logits_per_image.sigmoid().diagonal(), atol=1e-5)
    alone = backend.compute(SampleBatch(shown[1:2], captions[1:2]))
    assert np.allclose(alone["naflex-image"], found["naflex-image"][1:2], atol=1e-6)
    half = clip.Backend(f"siglip:{folder}", ModelSettings(dtype="bfloat16")).compute(SampleBatch(shown, captions))
    assert np.abs(half["naflex-score"] - found["naflex-score"]).max() < 0.03
    unreadable = SampleBatch(shown[:1], captions[:1])
    grid = backend.preparations[2]
    assert grid == PatchGrid(16, 36)
    unreadable._given["image"] = [np.zeros((1, 1, 3), np.uint8)]
    assert torch.isfinite(backend.compute(unreadable)["naflex-image"]).all()


def test_patches_are_never_more_than_there_is_room_for() -> None:
    rng = np.random.default_rng(3)
    for height, width in [(1, 60_000), (60_000, 1), (1, 1), *rng.integers(1, 5000, (200, 2)).tolist()]:
        rows, columns = patch_grid(height, width, 16, 256)
        assert rows >= 1 <= columns
        assert rows * columns <= 256, (height, width)


# ---- OpenCLIP's checkpoints


@pytest.mark.parametrize("kind", sorted(tiny.OPENCLIP))
def test_an_openclip_checkpoint_has_open_clips_features(kind: str, tmp_path: Path) -> None:
    """Widths, activation, place of the text tower and resizing are as its configuration says; from both files."""
    scores = []
    for old in (False, True):
        folder = tiny.save_openclip(tmp_path / str(old) / kind, kind, old=old)
        backend = clip.Backend(f"openclip:{folder}", ModelSettings())
        found = backend.compute(batch())
        for name, expected in REFERENCES["openclip"][kind].items():
            assert np.abs(np.asarray(found[f"{kind}-{name}"]) - expected).max() < 1e-5, name
        alone = backend.compute(batch(1))
        assert np.abs(np.asarray(alone[f"{kind}-image"][0]) - np.asarray(found[f"{kind}-image"][0])).max() < 1e-6
        assert [feature.width for feature in backend.features] == [16, 16]
        scores.append(found[f"{kind}-score"].tolist())
        for dtype in ("float16", "bfloat16"):
            half = clip.Backend(f"openclip:{folder}", ModelSettings(dtype=dtype)).compute(batch())
            assert np.abs(half[f"{kind}-score"] - found[f"{kind}-score"]).max() < 0.03
    assert scores[0] == scores[1]


def test_the_marks_in_a_caption_are_those_of_openclips_tokenizer(models: Path) -> None:
    tokens = ClipTokens(str(models / "clip"), marks=OPENCLIP_MARKS)
    for caption, expected in zip(OPENCLIP_CAPTIONS, REFERENCES["openclip"]["marks"], strict=True):
        assert tokens(caption).tolist()[: len(expected)] == expected
    assert tokens(tiny.CAPTIONS[0]).tolist() == REFERENCES["tokens"][0]


def test_a_checkpoint_that_is_no_plain_clip_is_told_in_a_line(tmp_path: Path) -> None:
    folder = tiny.save_openclip(tmp_path / "m", "plain")
    whole = json.loads((folder / "open_clip_config.json").read_bytes())
    cases: list[tuple[tuple[str, ...], Any, str]] = [
        (("model_cfg", "vision_cfg", "timm_model_name"), "fastvit_mci0", "timm_model_name = 'fastvit_mci0'"),
        (("model_cfg", "vision_cfg", "timm_model_name"), "vit_base_patch16_siglip_224", "load as siglip:"),
        (("model_cfg", "vision_cfg", "layers"), [3, 4, 6, 3], "a ResNet's"),
        (("model_cfg", "vision_cfg", "width"), 48, "of another size: vision_model"),
        (("model_cfg", "vision_cfg", "image_size"), [64, 32], "not square"),
        (("model_cfg", "text_cfg", "layers"), 3, "lack text_model.encoder.layers.2"),
        (("model_cfg", "text_cfg", "layers"), 1, "no place for: text_model.encoder.layers.1"),
        (("model_cfg", "text_cfg", "hf_tokenizer_name"), "bert-base-uncased", "hf_tokenizer_name"),
        (("model_cfg", "text_cfg", "no_causal_mask"), True, "no_causal_mask"),
        (("model_cfg", "multimodal_cfg"), {"layers": 1}, "multimodal_cfg"),
        (("model_cfg",), None, "model_cfg is no object"),
        (("preprocess_cfg", "resize_mode"), "longest", "resized by 'longest'"),
        (("preprocess_cfg", "std"), [0, 0, 0], "not of three colours"),
    ]
    for (*path, last), value, expected in cases:
        changed = json.loads(json.dumps(whole))
        place = changed
        for step in path:
            place = place[step]
        place[last] = value
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        with pytest.raises(InfrastructureError, match=expected) as raised:
            clip.Backend(f"openclip:{folder}", ModelSettings())
        assert "\n" not in str(raised.value)
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {}}))
    with pytest.raises(InfrastructureError, match="it lacks 'model_cfg'"):
        clip.Backend(f"openclip:{folder}", ModelSettings())
    bare = tiny.save_openclip(tmp_path / "bare", "plain")
    (bare / "vocab.json").unlink()
    with pytest.raises(InfrastructureError, match="its tokenizer is not here"):
        clip.Backend(f"openclip:{bare}", ModelSettings())
    with pytest.raises(InfrastructureError, match="it is a checkpoint of OpenCLIP: use openclip:"):
        clip.Backend(f"clip:{folder}", ModelSettings())


def test_an_openclip_model_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no config.json, by which other models are found there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "models--apple--DFN-tiny", "0123456789" * 4
    tiny.save_openclip(place / "snapshots" / commit, "dfn", old=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    directive = "openclip:apple/DFN-tiny"
    config = ExtractConfig((directive,), (), "")
    assert Catalogue(extractor_families(), config).identify() == {directive: [f"apple/DFN-tiny@{commit}"]}
    backend = clip.Backend(directive, ModelSettings(revision=commit))
    assert backend.compute(batch(1))["DFN-tiny-image"].shape == (1, 16)


def test_an_openclip_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_openclip(tmp_path / "m", "plain", old=True)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(InfrastructureError, match="safely"):
        clip.Backend(f"openclip:{folder}", ModelSettings())
    (folder / "open_clip_model.safetensors").write_bytes(b"none")
    with pytest.raises(InfrastructureError, match="cannot be read"):
        clip.Backend(f"openclip:{folder}", ModelSettings())


def test_a_model_of_the_wrong_kind_is_told_and_how_to_name_it(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use siglip:"):
        clip.Backend(f"clip:{models / 'siglip'}", ModelSettings())
    with pytest.raises(UsageError, match="use clip:"):
        clip.Backend(f"siglip:{models / 'clip'}", ModelSettings())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InfrastructureError, match="cannot be loaded"):
        clip.Backend(B32, settings(tmp_path))
    with pytest.raises(UsageError, match="no such CLIP model"):
        clip.Backend.sources("oai-clip-vit-b16", ModelSettings())


# ---- heads on features


def features(count: int = 4) -> Any:
    return torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(count, 768))), dim=1)


def test_the_nsfw_head_is_upstreams_network(models: Path) -> None:
    backend = clip_head.Backend("nsfw-image-oai-clip-vit-l-14", settings(models / "nsfw.pt"))
    given = features().float()
    scores = backend.compute(batch(4, features={f"{L14}-image": given}))["nsfw-image-score"]
    w = torch.load(models / "nsfw.pt", weights_only=True)
    x = (given - w["norm.running_mean"]) / w["norm.running_var"].sqrt()  # ε is 0
    for name in ("dense", "dense1", "dense2"):
        x = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"]).relu()
    expected = (x @ w["dense3.weight"].T + w["dense3.bias"]).sigmoid()[:, 0]
    assert np.allclose(scores, expected, atol=1e-6)
    assert backend.needs == (f"{L14}-image",)


def test_the_aesthetic_score_is_the_published_layers_in_a_row(models: Path) -> None:
    backend = clip_head.Backend("aesthetic", settings(models / "aesthetic.pth"))
    given = features().float()
    w = torch.load(models / "aesthetic.pth", weights_only=True)
    expected = given
    for number in (0, 2, 4, 6, 7):
        expected = expected @ w[f"layers.{number}.weight"].T + w[f"layers.{number}.bias"]
    scores = backend.compute(batch(4, features={f"{L14}-image": given.half()}))["aesthetic-score"]
    assert np.allclose(scores, expected[:, 0], atol=1e-3)  # the features came in half precision


@pytest.mark.parametrize(
    ("name", "width", "needed"),
    [
        ("aesthetic-v1-l14", 768, f"{L14}-image"),
        ("aesthetic-v1-b32", 512, f"{B32}-image"),
        ("aesthetic-v1-b16", 512, "clip-vit-base-patch16-image"),
        ("aesthetic-v2-5", 1152, "siglip-so400m-patch14-384-image"),
    ],
)
def test_aesthetic_predictors_are_their_published_layers(name: str, width: int, needed: str, tmp_path: Path) -> None:
    save = tiny.save_siglip_head if name == "aesthetic-v2-5" else tiny.save_linear_head
    backend = clip_head.Backend(name, settings(save(tmp_path / "head.pth", width)))
    assert backend.needs == (needed,)
    assert dict(backend.widths) == {needed: width}
    given = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(1).normal(size=(3, width))), dim=1)
    w = torch.load(tmp_path / "head.pth", weights_only=True)
    expected = given.float()
    for part in [key.removesuffix("weight") for key in w if key.endswith("weight")]:
        expected = torch.nn.functional.linear(expected, w[f"{part}weight"], w[f"{part}bias"])
    found = backend.compute(batch(3, features={needed: given.float()}))
    assert np.allclose(found[f"{name}-score"], expected[:, 0], atol=1e-6)
    [directive] = [d for d in clip_head.Backend.directives if d.name == name]
    assert how_to_make([f"{name}-score"]) == f"python3 06_metadata.py --models {directive.needs[0]},{name}"
    with pytest.raises(InfrastructureError, match=f"--weights {name}=/path/"):
        clip_head.Backend.sources(name, ModelSettings())


def test_a_head_for_another_width_is_a_line(models: Path, tmp_path: Path) -> None:
    """Its own tensors may not fit one another, or the features that the other model gives."""
    heads = [clip_head.Backend("aesthetic-v1-b32", settings(tiny.save_linear_head(tmp_path / "a.pth", 512)))]
    heads.append(clip_head.Backend("aesthetic", settings(models / "aesthetic.pth")))
    heads.append(clip_head.Backend("nsfw-image-oai-clip-vit-l-14", settings(models / "nsfw.pt")))
    small = {B32: clip.Backend(B32, settings(models / "clip")), L14: clip.Backend(L14, settings(models / "clip"))}
    for head, width in zip(heads, (512, 768, 768), strict=True):
        giver = small[head.needs[0].removesuffix("-image")]
        with pytest.raises(UsageError, match=f"takes {width} numbers of .* gives 64: one of the two has weights"):
            order([giver, head])
    assert order([heads[1], clip.Backend(L14, settings(models / "large"))])[1] is heads[1]
    broken = torch.load(models / "aesthetic.pth", weights_only=True)
    for change, expected in (
        ({"layers.2.weight": torch.zeros(128, 512)}, "layers.2.weight has"),
        ({"layers.7.weight": torch.zeros(2, 16), "layers.7.bias": torch.zeros(2)}, "ends with 2 numbers"),
        ({"layers.0.weight": torch.tensor(1.0)}, "other weights than its network"),
        ({"layers.0.weight": "text"}, "other weights than its network"),
        ({"layers.9.weight": torch.zeros(1)}, r"no place for: layers\.9"),
    ):
        torch.save(broken | change, tmp_path / "broken.pth")
        with pytest.raises(InfrastructureError, match=expected) as raised:
            clip_head.Backend("aesthetic", settings(tmp_path / "broken.pth"))
        assert "\n" not in str(raised.value)


def test_a_head_takes_the_features_of_the_large_model(models: Path) -> None:
    large = clip.Backend(L14, settings(models / "large"))
    head = clip_head.Backend("aesthetic", settings(models / "aesthetic.pth"))
    given = large.compute(batch(2))
    assert head.compute(batch(2, features={head.needs[0]: given[head.needs[0]]}))["aesthetic-score"].shape == (2,)


def test_weights_that_would_run_code_or_are_anothers_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(InfrastructureError, match="safely"):
        clip_head.Backend("aesthetic", settings(tmp_path / "evil.pt"))
    with pytest.raises(InfrastructureError, match="other weights than its network"):
        clip_head.Backend("aesthetic", settings(models / "nsfw.pt"))


# ---- toxicity


def test_toxicity_is_the_largest_of_detoxifys_seven(models: Path) -> None:
    backend = toxicity.Backend("nsfw-detoxify", settings(models / "toxicity"))
    found = backend.compute(SampleBatch([None] * len(TOXICITY_TEXTS), list(TOXICITY_TEXTS)))["nsfw-detoxify-score"]
    assert np.allclose(found, REFERENCES["toxicity"], atol=1e-6)


def test_toxicity_in_length_buckets_is_what_one_padded_batch_gives(models: Path) -> None:
    backend = toxicity.Backend("nsfw-detoxify", settings(models / "toxicity"))
    words = ["a cat", "long " * 100, "", "a photo of <pad> the <pad>", "caf\u00e9 " * 12, "x" * 31, "x" * 30, "a dog"]
    texts = [f"{n} {words[n % len(words)]}" for n in range(40)]
    seen: list[tuple[int, int]] = []
    handle = backend._model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = backend.compute(SampleBatch([None] * len(texts), texts))["nsfw-detoxify-score"]
    handle.remove()
    tokens = torch.from_numpy(np.stack([backend.preparations[0](text) for text in texts])).long()
    with torch.inference_mode():
        logits = backend._model(input_ids=tokens, attention_mask=(tokens != backend._tokens.padding).long()).logits
    expected = torch.sigmoid(logits[:, backend._outputs]).amax(1).numpy()
    assert np.abs(found - expected).max() < 1e-6  # each score is in its sample's place
    assert len(set(np.round(expected, 4))) > 20
    assert sum(rows for rows, _ in seen) == len(texts)
    assert sum(rows * longest for rows, longest in seen) < 0.5 * len(texts) * max(longest for _, longest in seen)


def test_a_bucket_is_padded_by_little_more_than_a_quarter() -> None:
    lengths = np.array([512, 1, 19, 20, 18, 400, 19, 30, 5])
    buckets = toxicity.length_buckets(lengths)
    assert sorted(row for rows, _ in buckets for row in rows) == list(range(len(lengths)))
    for rows, longest in buckets:
        assert lengths[rows].max() == longest <= lengths[rows].min() * 1.25 + toxicity.BUCKET_STEP
    assert toxicity.length_buckets(np.full(9, 7))[0][1] == 7
    assert toxicity.length_buckets(np.array([], int)) == []


def test_tokens_of_a_folder_need_no_torch_in_a_worker_process(models: Path) -> None:
    tokens = toxicity.Backend("nsfw-detoxify", settings(models / "toxicity")).preparations[0]
    program = (
        "import pickle, sys; tokens = pickle.load(sys.stdin.buffer); print(tokens('a \\ud800 cat' * 99).tolist()); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(tokens), capture_output=True, check=True)
    expected = AutoTokenizer.from_pretrained(models / "toxicity")(
        "a ? cat" * 99, truncation=True, max_length=128, padding="max_length"
    )["input_ids"]
    assert json.loads(done.stdout) == tokens("a \ud800 cat" * 99).tolist() == expected


def test_outputs_without_names_are_taken_in_detoxifys_order() -> None:
    assert toxicity.toxicity_outputs({i: f"LABEL_{i}" for i in range(16)}) == list(range(7))
    old = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
    assert toxicity.toxicity_outputs(dict(enumerate(old))) == list(range(6))
    named = dict(enumerate(("male", "toxicity", "insult", "female")))
    assert toxicity.toxicity_outputs(named) == [1, 2]
