"""LLaVA 1.6 and LLaVA-OneVision: an image is a thumbnail and as many tiles as its proportions need."""

from __future__ import annotations

from curation.backends.caption.base import ChatCaptioner
from curation.caption.captioner import Family
from curation.models.known import Model


def _model(short: str, name: str, parameters: float, suits: str, *other_names: str) -> Model:
    return Model(short, f"llava-hf/{name}", parameters, "Apache-2.0", suits, other_names)


class Backend(ChatCaptioner):
    """A batch holds images with the same number of tiles and nearly the same number of tokens."""

    family = Family(
        name="llava",
        batch_size=48,
        max_tokens=120,
        model_types=("llava", "llava_next", "llava_onevision"),
        hub_names=r"llava(?!.*(video|onevision-1\.5))",
        models=(
            _model("llava-1.6", "llava-v1.6-mistral-7b-hf", 7.567, "plain descriptions", "llava"),
            _model("llava-onevision-0.5b", "llava-onevision-qwen2-0.5b-ov-hf", 0.894, "small cards"),
            _model("llava-onevision-7b", "llava-onevision-qwen2-7b-ov-hf", 8.031, "charts and text in images too"),
        ),
    )
