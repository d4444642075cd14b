"""The backends, each on tiny models."""

from __future__ import annotations

from pathlib import Path

OTHER_FORMATS = (
    "pytorch_model.bin",
    "openvino_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "flax_model.msgpack",
)


def add_other_formats(folder: Path) -> None:
    """What whole copies of the hub's repositories have beside the safetensors: bytes that no reader can open."""
    for place in (".", "onnx", "openvino", "checkpoint-500"):
        (folder / place).mkdir(exist_ok=True)
        for name in OTHER_FORMATS:
            (folder / place / name).write_bytes(b"\0" * 64)
