"""Florence-2 of Microsoft: a small encoder-decoder that knows three lengths of caption, each by a token of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from curation.backends.caption.base import Inputs, VisionLanguageModel, Wording
from curation.backends.caption.processing import with_one_image
from curation.caption.captioner import Family, Question
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

    def _configure(self, question: Question) -> Wording:
        from PIL import Image

        tasks = self.processor.tasks_answer_post_processing_type
        task = TASKS[question.detail] if question.template is None else question.template.words
        if question.varies and question.template is not None:
            if any(known in question.template.source for known in tasks):
                raise UsageError(
                    f"--prompt {question.template.source}: a task of Florence-2 takes no field: ask in your own words"
                )
        elif tasks.get(task, "pure_text") != "pure_text":
            raise UsageError(f"--prompt {task}: gives boxes, not a caption")
        self._blank = Image.new("RGB", (64, 64))
        self._beside_blank = with_one_image(self.processor, self._blank)
        wording = Wording(question, task, question.max_tokens or self.family.max_tokens, task)
        return wording if question.varies else replace(wording, tensors=self._read(task))

    @property
    def task(self) -> str:
        """What the model is asked; of several questions, the first."""
        return self.wordings[0].asked

    def _read(self, text: str) -> dict[str, Any]:
        ids = self._beside_blank(images=[self._blank], text=text, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": self._torch.ones_like(ids)}

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        pixels = self._pixels(image)
        if said is None:
            return Inputs({"pixel_values": pixels, **wording.tensors}, tuple(pixels.shape[2:]))
        # The encoder numbers places from the left, so that the padding comes last.
        tensors = self._padded(self._read(said), on_the_right=True)
        return Inputs({"pixel_values": pixels, **tensors}, (tensors["input_ids"].shape[1], *pixels.shape[2:]))

    def _images_encoder(self) -> Any:
        return self.model.model.vision_tower

    def _texts(self, sequences: Any, prompt_length: int, number: int) -> list[str]:
        """An encoder-decoder returns the answer alone.  The post-processor reads its special tokens, except for the
        padding after rows that ended before others."""
        pad = self.generation.pad_token_id
        rows = [[token for token in row if token != pad] for row in sequences.tolist()]
        texts = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=False)
        size = (1, 1)  # it scales boxes, and a caption has none
        read = self.processor.post_process_generation
        task = self.wordings[number].asked
        return [read(text=text, task=task, image_size=size)[task] for text in texts]
