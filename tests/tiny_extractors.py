"""Tiny extractors of stage 06 with random weights, saved as the hub's models are and loaded by the real code.

Each answers in milliseconds on one core, and its scores say nothing.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from curation.backends.diffusion_tiny import byte_letters, fill_with_noise

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


def _tensors(seed: int, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    import torch

    rng = np.random.default_rng(seed)
    made = {}
    for name, (rows, columns) in sizes.items():
        made[f"{name}.weight"] = torch.from_numpy(
            (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        )
        made[f"{name}.bias"] = torch.zeros(rows)
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
        self._given = {"image": pictures, "text": captions}
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


def save_isc(path: Path, seed: int = 6) -> Path:
    """A descriptor network of seven stages and few channels, saved as the published one is: under the names of a
    parallel wrapper, beside the training's arguments."""
    import argparse

    import torch

    shapes: dict[str, tuple[int, ...]] = {"backbone.conv_stem.weight": (8, 3, 3, 3)}
    norms = {"backbone.bn1": 8, "bn": 256}
    widths = (8, 8, 8, 12, 16, 16, 24, 32)
    for stage, (inputs, out) in enumerate(itertools.pairwise(widths)):
        for block in range(2):
            name, wide = f"backbone.blocks.{stage}.{block}", 2 * inputs
            if stage == 0:
                shapes[f"{name}.conv.weight"] = (out, inputs, 3, 3)
                norms[f"{name}.bn1"] = out
            elif stage < 3:
                shapes |= {
                    f"{name}.conv_exp.weight": (wide, inputs, 3, 3),
                    f"{name}.conv_pwl.weight": (out, wide, 1, 1),
                }
                norms |= {f"{name}.bn1": wide, f"{name}.bn2": out}
            else:
                shapes |= {
                    f"{name}.conv_pw.weight": (wide, inputs, 1, 1), f"{name}.conv_dw.weight": (wide, 1, 3, 3),
                    f"{name}.se.conv_reduce.weight": (4, wide, 1, 1), f"{name}.se.conv_reduce.bias": (4,),
                    f"{name}.se.conv_expand.weight": (wide, 4, 1, 1), f"{name}.se.conv_expand.bias": (wide,),
                    f"{name}.conv_pwl.weight": (out, wide, 1, 1),
                }  # fmt: skip
                norms |= {f"{name}.bn1": wide, f"{name}.bn2": wide, f"{name}.bn3": out}
            inputs = out
    shapes["fc.weight"] = (256, 32)
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {n: rng.standard_normal(s, np.float32) / np.sqrt(max(1, np.prod(s[1:]))) for n, s in shapes.items()}
    for name, size in norms.items():
        tensors |= {
            f"{name}.weight": rng.uniform(0.8, 1.4, size), f"{name}.bias": rng.normal(0, 0.1, size),
            f"{name}.running_mean": rng.normal(0, 0.1, size), f"{name}.running_var": rng.uniform(0.5, 1.5, size),
        }  # fmt: skip
    state = {f"module.{n}": torch.from_numpy(np.asarray(v, np.float32)) for n, v in tensors.items()}
    state |= {f"module.{n}.num_batches_tracked": torch.tensor(9) for n in norms}
    torch.save(
        {"arch": "tf_efficientnetv2_m_in21ft1k", "args": argparse.Namespace(input_size=512), "state_dict": state}, path
    )
    return path
