"""Captions by Florence-2: a small encoder-decoder that knows three lengths of caption, each by a token of its own."""

from __future__ import annotations

from typing import Any

from curation.backends.caption.base import Inputs, VisionLanguageModel
from curation.errors import UsageError

TASKS = {"brief": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


class Backend(VisionLanguageModel):
    """Every image becomes a square of one size: all batches have one shape, and none is padded."""

    family = "florence2"
    squeezes = True
    compiles = True

    def _configure(self, prompt: str | None) -> None:
        from PIL import Image

        self.task = prompt or TASKS[self.detail]
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
        """An encoder-decoder gives the answer alone.  Its special tokens are the post-processor's to read, but for the
        padding behind rows that were done earlier than others."""
        pad = self.generation.pad_token_id
        rows = [[token for token in row if token != pad] for row in sequences.tolist()]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=False)
        size = (1, 1)  # scales boxes, of which a caption has none
        read = self.processor.post_process_generation
        return [read(text=text, task=self.task, image_size=size)[self.task] for text in texts]
