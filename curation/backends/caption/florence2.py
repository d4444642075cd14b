"""Florence-2 of Microsoft: a small encoder-decoder that knows three lengths of caption, each by a token of its own."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import Inputs, VisionLanguageModel
from curation.caption.captioner import Family
from curation.errors import UsageError
from curation.models.known import Model

TASKS = {"brief": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


def _model(name: str, parameters: float, suits: str, *other_names: str) -> Model:
    """The hub's copy without code.  Microsoft's own repositories want theirs to be run."""
    source = f"florence-community/Florence-2-{name}"
    return Model(f"florence2-{name}", source, parameters, "MIT", suits, (f"microsoft/florence-2-{name}", *other_names))


class Backend(VisionLanguageModel):
    """Every image is resized to one square, so that all batches have one shape and nothing is padded."""

    family = Family(
        name="florence2",
        batch_size=16,
        max_tokens=256,
        chats=False,
        model_types=("florence2",),
        hub_names=r"florence-?2",
        models=(
            _model("base", 0.231, "millions of images: the fastest", "base"),
            _model("large", 0.776, "the same, more exact, slower", "large"),
            _model("base-ft", 0.231, "tuned on public captions"),
            _model("large-ft", 0.776, "tuned on public captions"),
        ),
    )
    squeezes = True
    compiles = True

    def _configure(self, prompt: str | None) -> None:
        from PIL import Image

        self.task = prompt or TASKS[self.settings.detail]
        kind = self.processor.tasks_answer_post_processing_type.get(self.task, "pure_text")
        if kind != "pure_text":
            raise UsageError(f"--prompt {self.task}: gives boxes, not a caption")
        blank = Image.new("RGB", (64, 64))
        self._text_ids = self.processor(images=blank, text=self.task, return_tensors="pt")["input_ids"]
        self._mask = self._torch.ones_like(self._text_ids)

    def _inputs(self, image: Any) -> Inputs:
        pixels = self._pixels(image)
        tensors = {"pixel_values": pixels, "input_ids": self._text_ids, "attention_mask": self._mask}
        return Inputs(tensors, tuple(pixels.shape[2:]))

    def _images_encoder(self) -> Any:
        return self.model.model.vision_tower

    def _texts(self, sequences: Any, prompt_length: int) -> list[str]:
        """An encoder-decoder returns the answer alone.  The post-processor reads its special tokens, except for the
        padding after rows that ended before others."""
        pad = self.generation.pad_token_id
        rows = [[token for token in row if token != pad] for row in sequences.tolist()]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=False)
        size = (1, 1)  # it scales boxes, and a caption has none
        read = self.processor.post_process_generation
        return [read(text=text, task=self.task, image_size=size)[self.task] for text in texts]
