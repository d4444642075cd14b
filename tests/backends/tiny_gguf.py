"""A tiny vision encoder in GGUF, with random weights, for the language model that a package carries: together a real
vision server on a CPU, whose captions say nothing about the picture and yet depend on it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Value = int | float | bool | str | list[float]
ALIGNMENT = 32
GEMMA_WIDTH = 640  # of Gemma 3 270M
LOUDNESS = 25.0  # Gemma multiplies the embeddings of its text by √640
SIDE, PATCH, WIDTH, HIDDEN, LAYERS, MERGE = 112, 14, 32, 64, 1, 2  # 4×4 tokens an image


def save_vision_encoder(file: Path, projection: int) -> None:
    """SigLIP with Gemma 3's projector into a language model of width ``projection``."""
    settings: dict[str, Value] = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "gemma3",
        "clip.use_gelu": True,
        "clip.vision.image_size": SIDE,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": WIDTH,
        "clip.vision.feed_forward_length": HIDDEN,
        "clip.vision.block_count": LAYERS,
        "clip.vision.attention.head_count": 2,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projection_dim": projection,
        "clip.vision.projector.scale_factor": MERGE,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
    }
    rng = np.random.Generator(np.random.PCG64(5))

    def matrix(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))

    def norm(name: str) -> dict[str, NDArray[np.float32]]:
        return {f"{name}.weight": np.ones(WIDTH, np.float32), f"{name}.bias": np.zeros(WIDTH, np.float32)}

    tensors = {
        "v.patch_embd.weight": matrix(WIDTH, 3, PATCH, PATCH),
        "v.patch_embd.bias": np.zeros(WIDTH, np.float32),
        "v.position_embd.weight": matrix((SIDE // PATCH) ** 2, WIDTH),
        **norm("v.post_ln"),
        "mm.soft_emb_norm.weight": np.ones(WIDTH, np.float32),
        "mm.input_projection.weight": matrix(WIDTH, projection) * np.float32(np.sqrt(projection / WIDTH) * LOUDNESS),
    }
    for layer in range(LAYERS):
        name = f"v.blk.{layer}"
        tensors |= norm(f"{name}.ln1") | norm(f"{name}.ln2")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors |= {
                f"{name}.{part}.weight": matrix(WIDTH, WIDTH),
                f"{name}.{part}.bias": np.zeros(WIDTH, np.float32),
            }
        tensors |= {
            f"{name}.ffn_up.weight": matrix(HIDDEN, WIDTH),
            f"{name}.ffn_up.bias": np.zeros(HIDDEN, np.float32),
            f"{name}.ffn_down.weight": matrix(WIDTH, HIDDEN),
            f"{name}.ffn_down.bias": np.zeros(WIDTH, np.float32),
        }
    write(file, settings, tensors)


def write(file: Path, settings: dict[str, Value], tensors: dict[str, NDArray[np.float32]]) -> None:
    """GGUF, version 3: settings, tensors' shapes (innermost first), and their bytes at multiples of ``ALIGNMENT``."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    head += b"".join(_text(name) + _value(value) for name, value in settings.items())
    offset = 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    with open(file, "wb") as target:
        target.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for tensor in tensors.values():
            target.write(tensor.tobytes() + b"\0" * (-tensor.nbytes % ALIGNMENT))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
