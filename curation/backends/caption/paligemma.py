"""PaliGemma 1 and 2 of Google: they do not chat, but know short tasks such as ``caption en``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curation.backends.caption.base import Inputs, VisionLanguageModel
from curation.backends.caption.processing import load_processor
from curation.caption.captioner import Family
from curation.errors import UsageError
from curation.models.known import Model

TASKS = {"brief": "caption en", "detailed": "describe en", "more_detailed": "describe en"}
# Checkpoints that were tuned to one set of captions know this one alone.
TUNED = "caption en"
NO_CAPTIONS = ("answer", "ask", "detect", "ocr", "question", "segment")


def _model(short: str, name: str, parameters: float, suits: str) -> Model:
    return Model(short, f"google/{name}", parameters, "Gemma terms", suits, gated=True)


class Backend(VisionLanguageModel):
    """All batches have one shape: every image is one square, and the text is the same for all."""

    family = Family(
        name="paligemma",
        batch_size=16,
        max_tokens=256,
        chats=False,
        model_types=("paligemma",),
        hub_names=r"paligemma",
        models=(
            _model("paligemma2-3b", "paligemma2-3b-mix-448", 3.033, "short captions"),
            _model("paligemma2-3b-docci", "paligemma2-3b-ft-docci-448", 3.033, "long, exact captions"),
            _model("paligemma2-10b-docci", "paligemma2-10b-ft-docci-448", 9.662, "the same, better"),
        ),
    )
    half_overflows = True
    squeezes = True

    def _load_processor(self, folder: Path) -> Any:
        return load_processor(folder, "paligemma")

    def _configure(self, prompt: str | None) -> None:
        from PIL import Image

        own = TUNED if "-ft-" in self.name else TASKS[self.settings.detail]
        self.task = prompt or own
        if self.task.partition(" ")[0] in NO_CAPTIONS:
            raise UsageError(f"--prompt {self.task}: gives no caption; such as: caption en, describe en, caption de")
        text = f"{self.processor.image_token}{self.task}"
        made = self.processor(images=[Image.new("RGB", (64, 64))], text=[text], return_tensors="pt")
        self._text = {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}

    def _inputs(self, image: Any) -> Inputs:
        pixels = self._pixels(image)
        return Inputs({**self._text, "pixel_values": pixels}, (self._text["input_ids"].shape[1], *pixels.shape[2:]))
