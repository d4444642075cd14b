"""Chat models of transformers that take an image and a text: one way for all types that have no file of their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curation.backends.caption.base import UNQUANTIZED, ChatCaptioner, Inputs, Wording
from curation.backends.caption.processing import at_most_a_megapixel, load_processor
from curation.caption.captioner import Family, Question
from curation.errors import InfrastructureError, install
from curation.models.known import Model

TYPES = (
    "aya_vision", "cohere2_vision", "cosmos3_edge", "exaone4_5", "gemma3n", "gemma4", "gemma4_unified", "glm46v",
    "glm4v", "glm4v_moe", "glm_ocr", "glmga", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus",
    "lfm2_vl", "lfm3_vl", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3", "molmo2", "ovis2", "qianfan_ocr",
    "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip
# Names on the hub, for when its config.json cannot be had.
NAMES = r"(?<![a-z])gemma-?(3n|4)|internvl.*-hf\b|molmo-?2|minicpm-?v-?4[.-]?[67]|lfm-?[23](\.\d)?-?vl|glm-?4\.[156]v"


def _model(short: str, source: str, parameters: float, licence: str, suits: str, gated: bool = False) -> Model:
    return Model(short, source, parameters, licence, suits, gated=gated)


# Tensors that have a row for each token of the prompt, along their second dimension.
_BY_TOKEN = ("cross_attention_mask",)


class Backend(ChatCaptioner):
    """A batch holds images whose tensors have the same shapes."""

    family = Family(
        name="chat",
        batch_size=16,
        max_tokens=256,
        model_types=TYPES,
        hub_names=NAMES,
        models=(
            _model("gemma4-e2b", "google/gemma-4-E2B-it", 5.104, "Apache-2.0", "small cards"),
            _model("gemma4-e4b", "google/gemma-4-E4B-it", 7.996, "Apache-2.0", "good captions for their cost"),
            _model("gemma4-12b", "google/gemma-4-12B-it", 12.0, "Apache-2.0", "style, palette, mood"),
            _model("gemma4-26b-a4b", "google/gemma-4-26B-A4B-it", 25.8, "Apache-2.0", "large, as fast as a small one"),
            _model("gemma4-31b", "google/gemma-4-31B-it", 31.3, "Apache-2.0", "the same, best"),
            _model("gemma3n-e4b", "google/gemma-3n-E4B-it", 7.85, "Gemma terms", "small cards", gated=True),
            _model("internvl3.5-8b", "OpenGVLab/InternVL3_5-8B-HF", 8.528, "Apache-2.0", "documents, charts"),
            _model("molmo2-8b", "allenai/Molmo2-8B", 8.695, "Apache-2.0", "long, exact captions"),
            _model("minicpm-v-4.6", "openbmb/MiniCPM-V-4.6", 1.3, "Apache-2.0", "very small cards; text in images"),
            _model("lfm2-vl-450m", "LiquidAI/LFM2-VL-450M", 0.449, "LFM Open License", "very small cards"),
            _model("lfm2-vl-1.6b", "LiquidAI/LFM2-VL-1.6B", 1.597, "LFM Open License", "small cards"),
            _model("glm-4.6v-flash", "zai-org/GLM-4.6V-Flash", 10.293, "MIT", "documents; reasons where asked"),
        ),
        general=True,
    )
    unquantized = (
        *UNQUANTIZED,
        "connector",
        "multimodal_projector",
        "embed_vision",
        "vision_embed",
        "aligner",
        "merger",
    )

    def _load_processor(self, folder: Path) -> Any:
        from transformers import AutoConfig
        from transformers.utils import is_timm_available

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(getattr(config, "vision_config", None), "architecture") and not is_timm_available():
            raise InfrastructureError(
                f"--model {self.source.name}: its image encoder needs the package timm: {install('timm')}"
            )
        processor = load_processor(folder, config.model_type)
        images = processor.image_processor
        size = getattr(images, "size", None) or {}
        if hasattr(images, "merge_size") and "longest_edge" in size and "shortest_edge" in size:
            at_most_a_megapixel(images)
        return processor

    def _prompt(self, said: str, **variables: bool) -> str:
        """The template filled in, with the question as a list of parts or, where the template wants it, as a text."""
        from jinja2 import TemplateError

        marks = image_marks(self.processor)
        contents: tuple[Any, ...] = (
            [{"type": "image"}, {"type": "text", "text": said}],
            *(f"{mark}\n{said}" for mark in marks[:1]),
        )
        trouble: Exception | None = None
        for content in contents:
            messages = [{"role": "user", "content": content}]
            try:
                text: str = self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **variables
                )
            except (TemplateError, TypeError) as error:
                trouble = error
                continue
            if not marks or any(mark in text for mark in marks):
                return text
        raise ValueError(f"its chat template takes no image{f' ({trouble})' if trouble else ''}")

    def _configure(self, question: Question) -> Wording:
        self._takes = frozenset(inspect.signature(self.model.forward).parameters)
        return super()._configure(question)

    def _process(self, image: Any, text: str) -> Any:
        more = {"return_mm_token_type_ids": True} if "mm_token_type_ids" in self._takes else {}
        made = self.processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=self._adds_first, **more
        )
        is_tensor = self._torch.is_tensor
        return {name: made[name] for name in made if name in self._takes and is_tensor(made[name])}

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        inputs = super()._inputs(image, wording, said)
        length = inputs.tensors["input_ids"].shape[1]
        pad = self._torch.nn.functional.pad
        for name in inputs.tensors.keys() & _BY_TOKEN:
            tensor = inputs.tensors[name]
            padding = [0, 0] * (tensor.ndim - 2) + [length - tensor.shape[1], 0]
            inputs.tensors[name] = pad(tensor, padding)
        return inputs

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        return tuple(side for name in sorted(tensors) if name != "input_ids" for side in tensors[name].shape)

    def _joined(self, rows: Sequence[Inputs]) -> dict[str, Any]:
        joined = super()._joined(rows)
        if "image_token_pooling" in joined:  # Molmo's: places of patches, counted through all images of the batch
            patches = rows[0].tensors["pixel_values"].shape[:2].numel()
            places = [inputs.tensors["image_token_pooling"] for inputs in rows]
            moved = [self._torch.where(at >= 0, at + patches * index, at) for index, at in enumerate(places)]
            joined["image_token_pooling"] = self._torch.cat(moved)
        if "target_sizes" in joined:  # MiniCPM's: one picture, with the patches of all images side by side
            joined["pixel_values"] = self._torch.cat([inputs.tensors["pixel_values"] for inputs in rows], -1)
        return joined


def image_marks(processor: Any) -> list[str]:
    """The texts that stand for an image in a prompt, the one that templates write most often first."""
    names = ("image_token", "boi_token", "image_placeholder_token", "start_of_image_token", "start_of_img_token")
    found = [getattr(owner, name, None) for name in names for owner in (processor, processor.tokenizer)]
    return list(dict.fromkeys(mark for mark in map(str, filter(None, found)) if mark))
