"""The processors of transformers for images and text alone, whatever else their models take.

Many processors also want a part for videos or for audio, which needs torchvision or other packages, and is not used
here.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.backends.caption.torchless import find_class, has_torchvision

MOST_PIXELS = 1 << 20  # some models would take 16 times as many, and as many tokens


def load_processor(folder: Path, model_type: str) -> Any:
    """The processor of a model: its image processor and its tokenizer, without the other parts.

    Its class is the one that transformers has for the type, or the one that the model's files name, if transformers has
    that.  No code from the folder is run.

    Args:
        folder: With the model's files.
        model_type: Of its ``config.json``.

    Raises:
        ImportError: A package is missing that the class needs.
        ValueError: transformers has no processor for the model.
        OSError: A file is missing.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type) or _named_by(folder)
    if name is None:
        raise ValueError(f"transformers has no processor for its model_type {model_type!r}")
    kind = find_class(name)
    parts = {
        "image_processor": load_image_processor(folder, model_type),
        "tokenizer": kind._load_tokenizer_from_pretrained("tokenizer", folder, local_files_only=True),
    }
    settings, _ = kind.get_processor_dict(folder, local_files_only=True)
    processor = without_other_parts(kind, parts, settings)
    if processor.chat_template is None:
        processor.chat_template = settings.get("chat_template") or processor.tokenizer.chat_template
    processor.tokenizer.padding_side = "left"
    return processor


def without_other_parts(kind: Any, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A processor of a class of transformers that has an image processor and a tokenizer, and no other parts.

    Args:
        kind: The class.
        parts: Those two, by name.
        settings: Further arguments; those that the class does not take are left out.
    """
    takes = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in settings.items() if name in takes and name not in parts}
    unused = [part for part in kind.get_attributes() if part not in parts]
    given |= {part: Unused() for part in unused if part in takes}

    class ImagesAndText(kind):  # type: ignore[misc]
        """It is made with something in the place of the parts that are not used, and has none of them afterwards."""

        _parts = kind.get_attributes()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return list(cls._parts)

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return (
                None
                if isinstance(argument, Unused)
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    ImagesAndText.__name__ = kind.__name__  # by which it finds its classes
    processor = ImagesAndText(**parts, **given)
    for part in unused:
        processor.__dict__.pop(part, None)
    ImagesAndText._parts = [part for part in kind.get_attributes() if part in parts]
    return processor


def load_image_processor(folder: Path, model_type: str) -> Any:
    """The image processor of a model, by Pillow where transformers has it so, else by torch's operations.

    Raises: as ``load_processor``.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    by_torchvision = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    if by_torchvision and "pil" not in by_torchvision and not has_torchvision():
        return find_class(by_torchvision["torchvision"]).from_pretrained(folder, local_files_only=True)
    return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")


def marks_of(processor: Any) -> frozenset[str]:
    """The texts in a prompt that a processor or its tokenizer read as something else: special tokens, and what stands
    for an image."""
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    for owner in (processor, tokenizer):
        named = (getattr(owner, name, None) for name in dir(owner) if name.endswith(("_token", "_tokens")))
        found |= {str(value) for value in named if isinstance(value, str)}
    tasks = getattr(processor, "tasks_answer_post_processing_type", None) or {}  # Florence-2's
    return frozenset(mark for mark in {*found, *tasks} if len(mark.strip()) > 1)


def with_one_image(processor: Any, image: Any) -> Any:
    """A processor that has processed one image and gives its tensors for every other: for texts that vary, beside
    images that are prepared in another way.

    Args:
        processor: Of transformers.
        image: The image, as a Pillow image.
    """
    same = copy.copy(processor)
    same.image_processor = _OneImage(processor.image_processor, image)
    return same


class _OneImage:
    """An image processor in front of another, which it calls once for each set of arguments."""

    def __init__(self, inner: Any, image: Any) -> None:
        self._inner, self._image = inner, image
        self._made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, images: Any = None, **arguments: Any) -> Any:
        mark = repr(sorted(arguments.items(), key=str))
        if mark not in self._made:
            self._made[mark] = self._inner([self._image], **arguments)
        return copy.copy(self._made[mark])


class Unused:
    """In the place of a part that is not used: whatever it is asked for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def at_most_a_megapixel(image_processor: Any) -> None:
    """Bound the pixels that an image processor gives, whose ``size`` counts pixels (as those of Qwen and GLM do)."""
    size = dict(image_processor.size)
    size["longest_edge"] = min(size["longest_edge"], MOST_PIXELS)  # pixels in all, whatever the name says
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    image_processor.size = size


def _named_by(folder: Path) -> str | None:
    """The class that the model's own files name for its processor."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            name = json.loads((folder / file).read_bytes()).get("processor_class")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(name, str) and name.isidentifier() and name.endswith("Processor"):
            return name
    return None
