"""Tiny extractors of stage 06 with random weights, saved as the hub's models are and loaded by the real code.

Each answers in milliseconds on one core, and its scores say nothing.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate.tiny import fill_with_noise
from curation.extract.api import SampleFacts

# A vocabulary in which some pieces are merged: enough to see whether a tokenizer applies merges as CLIP's does.
MERGES = [
    ("a", "n"), ("t", "h"), ("th", "e</w>"), ("i", "n"), ("in", "g</w>"), ("o", "f</w>"), ("an", "d</w>"),
    ("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o</w>"), ("c", "a"), ("ca", "t</w>"), ("'", "t</w>"),
    ("Ã", "©"), ("r", "e"), ("re", "d</w>"), ("l", "e</w>"),
]  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_vocabulary() -> dict[str, int]:
    """Letters, letters that end a word, the merges, the two marks: in the order of CLIP's own vocabulary."""
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


def save_clip(folder: Path, *, width: int = 64, side: int = 224, patch: int = 32, seed: int = 1) -> Path:
    """A CLIP whose features have ``width`` numbers; 768 for what stands in for ViT-L/14."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    vocabulary = clip_vocabulary()
    end = vocabulary["<|endoftext|>"]
    text = {**SMALL, "vocab_size": len(vocabulary), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    vision = {**SMALL, "image_size": side, "patch_size": patch}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    model = CLIPModel(config)
    fill_with_noise(model, seed)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n", "utf-8")
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    return folder


def save_planted_clip(folder: Path, shown: Sequence[tuple[Any, Sequence[str]]], **sizes: Any) -> Path:
    """A CLIP that knows some pictures by heart: the feature of each is the sum of those of the texts that it shows.

    The two projections of a random CLIP are solved for it, so that everything that is loaded and computed is real.  Two
    different texts have a cosine of 0; at most as many texts and pictures as a tower is wide, 32, can be known.

    shown: pictures, height × width × 3 bytes, each with the texts.
    """
    import torch

    from curation.backends.extract.clip import Backend
    from curation.extract.settings import ModelSettings

    save_clip(folder, **sizes)
    backend = Backend(f"clip:{folder}", ModelSettings())
    texts = list(dict.fromkeys(text for _, of_picture in shown for text in of_picture))
    model: Any = backend._model
    pictures = SampleBatch([picture for picture, _ in shown], [""] * len(shown))
    tokens = torch.from_numpy(np.stack([backend._tokens(text) for text in texts])).long()
    with torch.inference_mode():
        seen = model.vision_model(**backend._picture_inputs(pictures)).pooler_output.double()
        read = model.text_model(input_ids=tokens).pooler_output.double()
    wanted_texts = torch.eye(len(texts), model.config.projection_dim, dtype=torch.float64)
    wanted = torch.stack([sum(wanted_texts[texts.index(text)] for text in of_picture) for _, of_picture in shown])
    with torch.no_grad():
        model.visual_projection.weight.copy_(torch.linalg.pinv(seen).mm(wanted).T.float())
        model.text_projection.weight.copy_(torch.linalg.pinv(read).mm(wanted_texts).T.float())
    model.save_pretrained(folder, safe_serialization=True)
    return folder


# Two checkpoints of OpenCLIP with what its published configurations vary: heads of another width, another ratio of the
# inner layer, the activation, where the text tower stands, and how pictures are resized.
OPENCLIP = {
    "plain": {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {
                "image_size": 64, "layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.5, "patch_size": 16,
            },
            "text_cfg": {"context_length": 77, "vocab_size": 0, "width": 24, "heads": 3, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    },
    "dfn": {
        "model_cfg": {
            "embed_dim": 16, "quick_gelu": True, "custom_text": True, "init_logit_bias": None,
            "vision_cfg": {
                "image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14,
                "timm_model_name": None, "pool_type": "tok",
            },
            "text_cfg": {
                "context_length": 32, "vocab_size": 0, "width": 24, "heads": 3, "layers": 2, "hf_tokenizer_name": None,
            },
        },
        "preprocess_cfg": {
            "size": [56, 56], "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5],
            "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 0,
        },
    },
}  # fmt: skip


def save_openclip(folder: Path, kind: str = "plain", seed: int = 11, *, old: bool = False) -> Path:
    """A checkpoint as OpenCLIP pushes it to the hub.  old: as a file of torch."""
    import copy

    import torch
    from safetensors.torch import save_file

    config: Any = copy.deepcopy(OPENCLIP[kind])
    vocabulary = clip_vocabulary()
    model = config["model_cfg"]
    model["text_cfg"]["vocab_size"] = len(vocabulary)
    tensors = filled(openclip_shapes(model), seed)
    tensors["logit_scale"] = torch.tensor(3.0)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n", "utf-8")
    if old:
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def openclip_shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a vision transformer and a text tower, under OpenCLIP's names."""
    vision, text, width = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    where = "text." if model.get("custom_text") else ""
    patch, wide, words = vision["patch_size"], vision["width"], text["width"]
    places = (vision["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "visual.class_embedding": (wide,), "visual.positional_embedding": (places, wide),
        "visual.proj": (wide, width), "visual.conv1.weight": (wide, 3, patch, patch),
        f"{where}positional_embedding": (text["context_length"], words), f"{where}text_projection": (words, width),
        f"{where}token_embedding.weight": (text["vocab_size"], words),
    }  # fmt: skip
    norms = {"visual.ln_pre": wide, "visual.ln_post": wide, f"{where}ln_final": words}
    for tower, part, size in (("visual.", vision, wide), (where, text, words)):
        inner = int(size * part.get("mlp_ratio", 4))
        for layer in range(part["layers"]):
            name = f"{tower}transformer.resblocks.{layer}"
            norms |= {f"{name}.ln_1": size, f"{name}.ln_2": size}
            for line, out, inputs in (
                ("attn.in_proj_", 3 * size, size), ("attn.out_proj.", size, size),
                ("mlp.c_fc.", inner, size), ("mlp.c_proj.", size, inner),
            ):  # fmt: skip
                shapes |= {f"{name}.{line}weight": (out, inputs), f"{name}.{line}bias": (out,)}
    return shapes | {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}


def save_siglip(folder: Path, seed: int = 2) -> Path:
    """A SigLIP of 64 pixels and 16 tokens."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    tokenizer = letter_tokenizer(pad_token="</s>", eos_token="</s>", unk_token="<unk>", ending="</s>")
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 64, "patch_size": 16})
    model = SiglipModel(config)
    fill_with_noise(model, seed)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def save_siglip2(folder: Path, seed: int = 12) -> Path:
    """A SigLIP 2 that takes pictures in their own shape (NaFlex): 36 patches of 16 pixels and 16 tokens."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    tokenizer = letter_tokenizer(pad_token="</s>", eos_token="</s>", unk_token="<unk>", ending="</s>")
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    text |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Siglip2Config(text_config=text, vision_config={**SMALL, "num_patches": 16, "patch_size": 16})
    model = Siglip2Model(config)
    fill_with_noise(model, seed)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=16, max_num_patches=36).save_pretrained(folder)
    return folder


TOXICITY_LABELS = (
    "toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit",
    "male", "female", "homosexual_gay_or_lesbian", "christian", "jewish", "muslim", "black", "white",
    "psychiatric_or_mental_illness",
)  # fmt: skip


def save_toxicity(folder: Path, seed: int = 3, labels: tuple[str, ...] | None = TOXICITY_LABELS) -> Path:
    """An XLM-RoBERTa classifier with detoxify's sixteen outputs, of which seven are toxicity; labels: None leaves them
    without names."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = letter_tokenizer(
        bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        ending="</s>", beginning="<s>",
    )  # fmt: skip
    named = {} if labels is None else {"id2label": dict(enumerate(labels))}
    config = XLMRobertaConfig(
        **SMALL, vocab_size=len(tokenizer), max_position_embeddings=130, num_labels=16, type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id, **named,
    )  # fmt: skip
    model = XLMRobertaForSequenceClassification(config)
    fill_with_noise(model, seed)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder


def letter_tokenizer(*, ending: str, beginning: str = "", **named: str) -> Any:
    """One token a byte, with a mark behind the text and perhaps one before it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = list(dict.fromkeys(named.values()))
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*marks, *byte_letters()])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    used = [(mark, marks.index(mark)) for mark in dict.fromkeys((beginning, ending)) if mark]
    core.post_processor = processors.TemplateProcessing(single=f"{beginning} $A {ending}".strip(), special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def save_nsfw_head(path: Path, seed: int = 4) -> Path:
    """DataComp's image classifier on features of 768 numbers, as its weights are published."""
    import torch

    tensors = _tensors(seed, {"dense": (64, 768), "dense1": (512, 64), "dense2": (256, 512), "dense3": (1, 256)})
    rng = np.random.default_rng(seed)
    tensors |= {
        "norm.weight": torch.ones(768), "norm.bias": torch.zeros(768),
        "norm.running_mean": torch.from_numpy(rng.normal(0, 0.02, 768).astype(np.float32)),
        "norm.running_var": torch.full((768,), 0.0013), "norm.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip
    torch.save(tensors, path)
    return path


def save_aesthetic_head(path: Path, seed: int = 5) -> Path:
    """The improved aesthetic predictor's five layers, as its weights are published."""
    import torch

    sizes = {"layers.0": (1024, 768), "layers.2": (128, 1024), "layers.4": (64, 128), "layers.6": (16, 64)}
    torch.save(_tensors(seed, sizes | {"layers.7": (1, 16)}), path)
    return path


def save_linear_head(path: Path, width: int, seed: int = 6) -> Path:
    """LAION's first aesthetic predictor, as its weights are published."""
    import torch

    torch.save(_tensors(seed, {"": (1, width)}, ""), path)
    return path


def save_siglip_head(path: Path, width: int = 1152, seed: int = 7) -> Path:
    """The aesthetic predictor on SigLIP's features, as its weights are published."""
    import torch

    sizes = ((1024, width), (128, 1024), (64, 128), (16, 64), (1, 16))
    torch.save(_tensors(seed, {f"scoring_head.{2 * i}": size for i, size in enumerate(sizes)}), path)
    return path


def _tensors(seed: int, sizes: dict[str, tuple[int, int]], dot: str = ".") -> dict[str, Any]:
    import torch

    rng = np.random.default_rng(seed)
    made = {}
    for name, (rows, columns) in sizes.items():
        made[f"{name}{dot}weight"] = torch.from_numpy(
            (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        )
        made[f"{name}{dot}bias"] = torch.zeros(rows)
    return made


@functools.cache
def picture(seed: int, width: int, height: int) -> Any:
    """height × width × 3 bytes: a gradient with noise, the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (7 + seed) + c) + np.cos(y / (11 + c)) for c in range(3)], axis=2)
    noise = np.random.Generator(np.random.PCG64(seed)).integers(-20, 20, waves.shape)
    return (127.5 + 50 * waves + noise).clip(0, 255).astype(np.uint8)


class SampleBatch:
    """Pictures and captions as an extractor gets them, prepared here and now."""

    def __init__(
        self, pictures: list[Any], captions: list[str], features: dict[str, Any] | None = None, device: str = "cpu"
    ) -> None:
        sizes = [(0, 0) if pixels is None else pixels.shape[1::-1] for pixels in pictures]  # of texts alone: none
        facts = [SampleFacts("key", {}, caption, b"image", size) for size, caption in zip(sizes, captions, strict=True)]
        self._given = {"image": pictures, "text": captions, "sample": facts}
        self.readable = np.ones(len(pictures), bool)
        self.features = features or {}
        self._device = device

    def __len__(self) -> int:
        return len(self.readable)

    def prepared(self, preparation: Any) -> Any:
        made = [preparation(given) for given in self._given[preparation.takes]]
        return made if isinstance(made[0], dict) else np.stack(made)

    def device_tensor(self, preparation: Any) -> Any:
        import torch

        return torch.from_numpy(self.prepared(preparation)).to(self._device)

    def beside(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def save_isc(path: Path, seed: int = 6) -> Path:
    """A descriptor network of seven stages and few channels, saved as the published one is: under the names of a
    parallel wrapper, beside the training's arguments."""
    import argparse

    import torch

    stages = ((1, 8, 1), (2, 8, 2), (1, 12, 2), (2, 16, 2), (1, 16, 2), (1, 24, 2), (1, 32, 2))
    tensors = filled(isc_shapes(stages, stem=8), seed)
    tensors["bn.running_mean"].zero_()
    tensors["bn.bias"].zero_()
    state = {f"module.{name}": value for name, value in tensors.items()}
    arguments = argparse.Namespace(input_size=512)
    torch.save({"arch": "tf_efficientnetv2_m_in21ft1k", "args": arguments, "state_dict": state}, path)
    return path


def save_sscd(path: Path, seed: int = 9) -> Path:
    """SSCD's weights as torchvision's file has them, of a ResNet with few blocks."""
    import torch

    torch.save(filled(sscd_shapes(), seed), path)
    return path


def sscd_shapes(depths: tuple[int, ...] = (1, 2, 1, 1), width: int = 32) -> dict[str, tuple[int, ...]]:
    """The tensors of a ResNet with blocks of three convolutions, by torchvision's names; (3, 4, 6, 3) is ResNet50."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.conv1.weight": (64, 3, 7, 7)}
    norms = {"backbone.bn1": 64}
    inputs = 64
    for stage, depth in enumerate(depths, 1):
        narrow = 64 << (stage - 1)
        for block in range(depth):
            name = f"backbone.layer{stage}.{block}"
            for number, (out, taken, kernel) in enumerate(
                ((narrow, inputs, 1), (narrow, narrow, 3), (4 * narrow, narrow, 1)), 1
            ):
                shapes[f"{name}.conv{number}.weight"] = (out, taken, kernel, kernel)
                norms[f"{name}.bn{number}"] = out
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * narrow, inputs, 1, 1)
                norms[f"{name}.downsample.1"] = 4 * narrow
            inputs = 4 * narrow
    for name, size in norms.items():
        shapes |= {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes | {"backbone.fc.weight": (width, inputs), "backbone.fc.bias": (width,)}


MODES = ("RGB", "RGBA", "LA", "P", "L", "CMYK")


def exact_pictures() -> Any:
    """(mode, width, height, Pillow image) of 210 sizes and six modes, from integers: the same everywhere."""
    from PIL import Image

    rng = np.random.Generator(np.random.PCG64(2024))
    extreme = [(1, 1), (1, 300), (300, 1), (224, 224), (225, 224), (2, 449), (1, 330), (331, 1), (223, 447), (640, 480)]
    sizes = [*extreme, *((int(w), int(h)) for w, h in rng.integers(1, 700, (200, 2)))]
    for number, (width, height) in enumerate(sizes):
        mode = MODES[number % len(MODES)]
        channels = len(Image.new(mode, (1, 1)).getbands())
        coarse = rng.integers(0, 200, (-(-height // 9), -(-width // 9), channels), np.uint8)
        smooth = coarse.repeat(9, 0).repeat(9, 1)[:height, :width]
        pixels = smooth + rng.integers(0, 56, (height, width, channels), np.uint8)
        image = Image.frombytes(mode, (width, height), pixels.tobytes())
        if mode == "P":
            image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        yield mode, width, height, image


# Rectangles as a detector of text has them, and how far each is to grow: straight, turned, thin, and wound backwards.
QUADS = (
    ([[10.0, 20.0], [110.9, 20.0], [110.9, 44.6], [10.0, 44.6]], 15.8),
    ([[30.2, 40.7], [128.4, 12.3], [136.9, 41.1], [38.6, 69.6]], 17.3),
    ([[5.0, 5.0], [90.3, 6.1], [90.2, 9.4], [5.1, 8.3]], 2.6),
    ([[60.0, 10.0], [40.0, 30.0], [70.0, 60.0], [90.0, 40.0]], 14.1),
)


def text_picture() -> Any:
    """240 × 320 × 3: lines of text in Pillow's own font, two of them in one row, one turned, one on its head."""
    from PIL import Image, ImageDraw, ImageFont

    def line(text: str, size: int) -> Any:
        font = ImageFont.load_default(size)
        box = font.getbbox(text)
        image = Image.new("RGB", (int(box[2]) + 8, int(box[3]) + 8), (235, 228, 210))
        ImageDraw.Draw(image).text((4, 2), text, font=font, fill=(30, 40, 90))
        return image

    page = Image.new("RGB", (320, 240), (235, 228, 210))
    page.paste(line("Summer sale", 40), (10, 6))
    page.paste(line("left words", 20), (10, 72))
    page.paste(line("on the right", 20), (180, 76))
    page.paste(line("turned by 12\u00b0", 24).rotate(12, expand=True, fillcolor=(235, 228, 210)), (20, 100))
    page.paste(line("upside down line", 22).rotate(180), (120, 190))
    return np.asarray(page)


CAPTIONS = (
    "a photo of the cat", "", "  ", "Caf\u00e9 &amp;amp; cr&egrave;me", "e&#769;t\u00e9",
    "\u039f\u0394\u039f\u03a3 \u0130stanbul \u1e9e",
    "don't I'VE we'll", "\U0001f926\U0001f3fd\u200d\u2640\ufe0f \u6f22\u5b57 \ud55c\uad6d\uc5b4", "x" * 500,
    "a,b;c:::--- 100% 3.14 \u00bd \u2163", "line\nbreak\t\u00a0nbsp\u2003em",
    "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\x9d sch\u00c3\u00b6n", "\u017f'\u017f \u212a",
    "painting of the red cat and " * 40, "\x1c\x1d sep\x85next", "\x00nul", "\ufb01 ligature \uff8a\uff9d",
    "it\u2019s \u201cquoted\u201d", "&lt;b&gt;bold&lt;/b&gt;", "\u200bzero\u200d",
)  # fmt: skip


def filled(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """A value for every tensor of a network, whatever made it, the same on every machine: matrices normal with
    deviation 1/√fan-in, running variances and one-dimensional weights around one, everything else around zero."""
    import torch
    import xxhash

    made = {}
    for name, shape in shapes.items():
        rng = np.random.Generator(np.random.PCG64([seed, xxhash.xxh3_64_intdigest(name.encode())]))
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(7)
            continue
        if len(shape) >= 2:
            values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
        elif name.endswith(("running_var", "weight", "scale")):
            values = rng.random(shape, np.float32) + np.float32(0.5)
        else:
            values = (rng.random(shape, np.float32) - np.float32(0.5)) / 4
        made[name] = torch.from_numpy(np.array(values, np.float32))
    return made


def scrfd_tensors(seed: int = 7) -> dict[str, Any]:
    """Weights of SCRFD-10GF under the names of the published file, lively enough to see many boxes."""
    made = filled(scrfd_shapes(), seed)
    made["bbox_head.stride_cls.0.weight"] *= 4
    made["bbox_head.stride_cls.0.bias"] -= 6
    made["bbox_head.stride_reg.0.weight"] *= 0.2
    made["bbox_head.stride_reg.0.bias"] += 2
    return made


def scrfd_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for number, (out, inputs) in {0: (28, 3), 3: (28, 28), 6: (56, 28)}.items():
        shapes[f"backbone.stem.{number}.weight"] = (out, inputs, 3, 3)
        norm(f"backbone.stem.{number + 1}", out)
    inputs = 56
    for stage, (depth, width) in enumerate(((3, 56), (4, 88), (2, 88), (3, 224)), 1):
        for block in range(depth):
            name = f"backbone.layer{stage}.{block}"
            shapes |= {f"{name}.conv1.weight": (width, inputs, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            norm(f"{name}.bn1", width)
            norm(f"{name}.bn2", width)
            if block == 0 and stage > 1:
                shapes[f"{name}.downsample.1.weight"] = (width, inputs, 1, 1)
                norm(f"{name}.downsample.2", width)
            inputs = width
    necks = {
        "lateral_convs": (88, 88, 224),
        "fpn_convs": (56,) * 3,
        "downsample_convs": (56,) * 2,
        "pafpn_convs": (56,) * 2,
    }
    for part, all_inputs in necks.items():
        for i, inputs in enumerate(all_inputs):
            kernel = 1 if part == "lateral_convs" else 3
            shapes |= {
                f"neck.{part}.{i}.conv.weight": (56, inputs, kernel, kernel),
                f"neck.{part}.{i}.conv.bias": (56,),
            }
    for i, inputs in enumerate((56, 80, 80)):
        name = f"bbox_head.cls_stride_convs.0.{i}"
        shapes |= {f"{name}.conv.weight": (80, inputs, 3, 3), f"{name}.gn.weight": (80,), f"{name}.gn.bias": (80,)}
    for part, out in (("stride_cls", 2), ("stride_reg", 8)):
        shapes |= {f"bbox_head.{part}.0.weight": (out, 80, 3, 3), f"bbox_head.{part}.0.bias": (out,)}
    shapes |= {f"bbox_head.scales.{i}.scale": () for i in range(3)}
    return shapes | {"bbox_head.integral.project": (9,)}


def save_scrfd(path: Path, seed: int = 7) -> Path:
    """SCRFD's weights as DataComp publishes them."""
    import torch

    torch.save({"state_dict": scrfd_tensors(seed)}, path)
    return path


def save_scrfd_onnx(path: Path, seed: int = 7) -> Path:
    """SCRFD-10GF as insightface exports it, for one picture, with the weights of ``scrfd_tensors``.

    No package has the published weights.  The older exporter of torch, which insightface used, writes the same
    operations: the group normalisation in parts, sizes that are computed, and outputs that mix the pictures of a batch.
    """
    import torch

    from curation.backends.extract.scrfd import ScrfdNetwork

    class Exported(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = ScrfdNetwork(scrfd_tensors(seed))

        def forward(self, pictures: Any) -> tuple[Any, ...]:
            network, scores, reaches = self.network, [], []
            for number, features in enumerate(network._neck(network._backbone(pictures))):
                score, reach = network._head(features, number)
                scores.append(score.permute(2, 3, 0, 1).reshape(-1, 1))
                reaches.append(reach.permute(2, 3, 0, 1).reshape(-1, 4))
            return (*scores, *reaches)

    names = [f"{part}_{stride}" for part in ("score", "bbox") for stride in (8, 16, 32)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter is deprecated
        torch.onnx.export(
            Exported(),
            (torch.zeros(1, 3, 64, 64),),
            str(path),
            dynamo=False,
            opset_version=12,
            input_names=["input.1"],
            output_names=names,
            dynamic_axes={"input.1": {2: "height", 3: "width"}},
        )
    return path


# Depth, width and widening of EfficientNetV2-M's stages.
ISC_STAGES = ((3, 24, 1), (5, 48, 4), (5, 80, 4), (7, 160, 4), (14, 176, 6), (18, 304, 6), (5, 512, 6))


def isc_shapes(stages: tuple[tuple[int, int, int], ...] = ISC_STAGES, stem: int = 24) -> dict[str, tuple[int, ...]]:
    """The tensors of the descriptor network, under timm's names."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.conv_stem.weight": (stem, 3, 3, 3)}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("backbone.bn1", stem)
    inputs = stem
    for stage, (depth, out, wider) in enumerate(stages):
        for block in range(depth):
            name, wide = f"backbone.blocks.{stage}.{block}", wider * inputs
            if stage == 0:
                shapes[f"{name}.conv.weight"] = (out, inputs, 3, 3)
                widths = [out]
            elif stage < 3:
                shapes |= {
                    f"{name}.conv_exp.weight": (wide, inputs, 3, 3),
                    f"{name}.conv_pwl.weight": (out, wide, 1, 1),
                }
                widths = [wide, out]
            else:
                gate = max(1, inputs // 4)
                shapes |= {
                    f"{name}.conv_pw.weight": (wide, inputs, 1, 1), f"{name}.conv_dw.weight": (wide, 1, 3, 3),
                    f"{name}.se.conv_reduce.weight": (gate, wide, 1, 1), f"{name}.se.conv_reduce.bias": (gate,),
                    f"{name}.se.conv_expand.weight": (wide, gate, 1, 1), f"{name}.se.conv_expand.bias": (wide,),
                    f"{name}.conv_pwl.weight": (out, wide, 1, 1),
                }  # fmt: skip
                widths = [wide, wide, out]
            for number, width in enumerate(widths, 1):
                norm(f"{name}.bn{number}", width)
            inputs = out
    shapes["fc.weight"] = (256, inputs)
    norm("bn", 256)
    return shapes
