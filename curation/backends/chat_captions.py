"""Captions by models that chat: the question that goes with an image, and inputs padded to few lengths."""

from __future__ import annotations

from typing import Any

from curation.backends.vision_language import Inputs, VisionLanguageModel

LENGTH_STEP = 64  # tokens: images of nearly one size share a batch, padded alike alone or together

PROMPTS = {
    "brief": "Describe this image in one sentence. Write the description only.",
    "detailed": "Describe this image in two or three sentences: its subjects, what they do, and the setting. "
    "Write the description only.",
    "more_detailed": "Describe this image in detail: its subjects; the style, medium and technique; the palette and "
    "lighting; the composition; the mood; any text, signature or watermark that can be read. Write the description "
    "only, without an introduction.",
}


class ChatCaptioner(VisionLanguageModel):
    """A decoder-only model with a chat template."""

    def _configure(self, prompt: str | None) -> None:
        content = [{"type": "image"}, {"type": "text", "text": prompt or PROMPTS[self.detail]}]
        if not (self.processor.chat_template or self.processor.tokenizer.chat_template):
            raise ValueError("it has no chat template")
        self._text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        first = self.processor.tokenizer.bos_token
        self._adds_first = not (first and self._text.startswith(first))  # some templates write it, some leave it

    def _inputs(self, image: Any) -> Inputs:
        made = self._process(image)
        length = made["input_ids"].shape[1]
        padded = -length % LENGTH_STEP
        tensors = {}
        for name, tensor in made.items():
            if tensor.ndim == 2 and tensor.shape[1] == length and tensor.shape[0] == 1:
                value = self.generation.pad_token_id if name == "input_ids" else 0
                tensor = self._torch.nn.functional.pad(tensor, (padded, 0), value=value)
            tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return Inputs(tensors, (length + padded, *self._more_shape(tensors)))

    def _process(self, image: Any) -> Any:
        return self.processor(
            images=[image], text=[self._text], return_tensors="pt", add_special_tokens=self._adds_first
        )

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        """What two images must have in common beside their length, to be joined."""
        return tuple(tensors["pixel_values"].shape[1:])
