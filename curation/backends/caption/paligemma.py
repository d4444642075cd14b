"""PaliGemma 1 and 2 of Google: they do not chat, but know short tasks such as ``caption en``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from curation.backends.caption.base import Inputs, VisionLanguageModel, Wording
from curation.backends.caption.processing import load_processor, with_one_image
from curation.caption.captioner import Family, Question
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

    def _configure(self, question: Question) -> Wording:
        from PIL import Image

        own = TUNED if "-ft-" in self.name else TASKS[question.detail]
        asked = own if question.template is None else question.template.words
        begun = own if question.template is None else question.template.source
        if begun.partition(" ")[0] in NO_CAPTIONS:
            raise UsageError(f"--prompt {begun}: gives no caption; such as: caption en, describe en, caption de")
        self._blank = Image.new("RGB", (64, 64))
        self._beside_blank = with_one_image(self.processor, self._blank)
        wording = Wording(question, asked, question.max_tokens or self.family.max_tokens, asked)
        return wording if question.varies else replace(wording, tensors=self._read(asked))

    def _read(self, task: str) -> dict[str, Any]:
        text = f"{self.processor.image_token}{task}"
        made = self._beside_blank(images=[self._blank], text=[text], return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        pixels = self._pixels(image)
        tensors = wording.tensors if said is None else self._padded(self._read(said))
        return Inputs({**tensors, "pixel_values": pixels}, (tensors["input_ids"].shape[1], *pixels.shape[2:]))
