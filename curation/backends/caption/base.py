"""What the captioners that run in transformers share: loading, preparing images, one call of the device.

A family derives its ``Backend`` from ``ChatCaptioner`` (a model with a chat template) or ``VisionLanguageModel`` (any
other), and overrides what is special about it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from curation import backends
from curation.backends.caption import quantized, reasoning
from curation.backends.caption.decoding import NoRepeatedNgrams, SeededSampling, StaticCaches, padded_rows
from curation.backends.caption.packing import Inputs as Inputs
from curation.backends.caption.packing import Packer, together
from curation.backends.caption.processing import marks_of
from curation.caption.captioner import (
    CaptionSettings,
    Detail,
    Family,
    Gather,
    Inquiry,
    OutOfMemory,
    Quantize,
    Question,
    known_models,
)
from curation.caption.templates import Filled, Values
from curation.errors import DeviceError, InfrastructureError, SampleError, UsageError, device_failure, install
from curation.libraries import np
from curation.models import compiling
from curation.models.batch_size import free_memory, shortage_of, use_device
from curation.models.hub_cache import (
    TRANSFORMER,
    ModelSource,
    import_bitsandbytes,
    quiet_transformers,
    resolve,
    snapshot,
)
from curation.models.hub_errors import hub_error_line, hub_errors, hub_trouble
from curation.models.known import Model
from curation.models.needs import HubFile, WeightsNeed, whole_model
from curation.models.weights import MODEL_FILES
from curation.options import logger
from curation.replies import CUT, FIRST, WHOLE, Attempt, Reply

# Modules that keep 16 bits under --quantize, as patterns of their whole names: they are small, and rounding hurts them.
UNQUANTIZED = ("vision_tower", "visual", "vision_model", "multi_modal_projector", "lm_head")
LENGTH_STEP = 64  # tokens: prompts are padded to a multiple, so that images of similar size share a batch
LENGTH_STEPS = 8  # a length has so many steps before it is doubled, which are of 64 tokens at least
PROMPTS: Mapping[Detail, str] = {
    "brief": "Describe this image in one sentence. Write the description only.",
    "detailed": "Describe this image in two or three sentences: its subjects, what they do, and the setting. "
    "Write the description only.",
    "more_detailed": "Describe this image in detail: its subjects; the style, medium and technique; the palette and "
    "lighting; the composition; the mood; any text, signature or watermark that can be read. Write the description "
    "only, without an introduction.",
}

_PLACE = "\ue000the question\ue001"  # stands for a question that varies, while the chat template is filled in
WORDS_PER_TOKEN = 0.6  # English has 0.75; models count badly

_GPU_SHARE = 0.7  # of the free memory, for weights under --offload; the rest is for what they compute
_LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError)
_PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError)


def words_of(
    question: Question, settings: CaptionSettings, max_tokens: int, prompts: Mapping[Detail, str] = PROMPTS
) -> str:
    """What a chat model is asked: the user's own prompt without its fields, or the family's, which asks for no more
    than fits.

    Args:
        question: One of the captioner's.
        settings: The captioner's.
        max_tokens: Of a caption.
        prompts: The family's, by ``detail``.
    """
    if question.template is not None:
        return question.template.words
    words = (
        settings.max_words if settings.max_words is not None else max(5, round(max_tokens * WORDS_PER_TOKEN / 5) * 5)
    )
    bound = f" Use at most {words} words." if words else ""
    return prompts[question.detail] + bound


def filled_for(question: Question, inquiry: Inquiry | None) -> Filled | None:
    """What is asked about an image; None where it is the same for all.  Without an inquiry the fields are empty."""
    if not question.varies or question.template is None:
        return None
    filled = None if inquiry is None else inquiry.filled
    return filled or question.template.fill(Values("", "", {}, None))


@dataclass(frozen=True, slots=True)
class Wording:
    """A question as a family puts it.

    Attributes:
        question: It.
        asked: In words, without fields.
        max_tokens: Of a caption.
        text: The whole text for the model; a place in it where the question varies.
        begun: The mark with which the text begins the model's reasoning; "" where it does not.
        thought_tokens: For the reasoning before a caption, beside the caption's own.
        tensors: The inputs that are the same for all images.
        special: The special tokens in the question's own words.
    """

    question: Question
    asked: str
    max_tokens: int
    text: str
    begun: str = ""
    thought_tokens: int = 0
    tensors: Mapping[str, Any] = field(default_factory=dict)
    special: tuple[int, ...] = ()


def padded_length(length: int, gather: Gather) -> int:
    """The tokens to which a prompt of ``length`` tokens is padded.

    The step grows with the length, so that large images too share their batch with many others.  Until version 0.5.0 it
    was the same for all lengths.
    """
    growing = (1 << length.bit_length() - 1) // LENGTH_STEPS if gather == "images" else 0
    return length + -length % max(LENGTH_STEP, growing)


class SquareImages:
    """The image processor of a model that takes every image as one rectangle, split between host and device.

    The host resizes, and the device rescales and normalises.  A processor of transformers does all of it on the host,
    which takes three times as long and moves four times as many bytes.  In float32 the numbers are the same to the
    last bit.
    """

    def __init__(self, processor: Any) -> None:
        import torch

        size = processor.size
        self._size = (int(size["width"]), int(size["height"]))
        self._resample = int(processor.resample)
        values = np.arange(256, dtype=np.float64)
        if processor.do_rescale:
            values = values * processor.rescale_factor
        table = np.repeat(values.astype(np.float32)[None], 3, 0)  # what each byte becomes, by channel
        if processor.do_normalize:
            mean, deviation = (np.array(v, np.float32)[:, None] for v in (processor.image_mean, processor.image_std))
            table = (table - mean) / deviation
        self._table = torch.from_numpy(table)

    @classmethod
    def of(cls, processor: Any) -> SquareImages | None:
        """For a processor that resizes to one size, rescales and normalises; None where it does more."""
        size = getattr(processor, "size", None) or {}
        has_size = all(name in size and size[name] for name in ("height", "width"))
        more = ("do_center_crop", "do_pad", "do_pan_and_scan")
        if not (has_size and processor.do_resize) or any(getattr(processor, name, False) for name in more):
            return None
        return cls(processor)

    def bytes_of(self, image: Any) -> Any:
        """Resize a Pillow image: 1 × 3 × height × width, uint8.

        numpy does it, because torch would start a team of threads for each thread that prepares images.
        """
        import torch

        pixels = np.asarray(image.resize(self._size, self._resample))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])

    def numbers_of(self, pixels: Any, dtype: Any) -> Any:
        """Rescale and normalise what ``bytes_of`` gave, on the device where it is."""
        import torch

        table = self._table.to(pixels.device, dtype)
        numbers = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
        for channel in range(3):
            found = table[channel].index_select(0, pixels[:, channel].reshape(-1).int())
            numbers[:, channel] = found.view(numbers[:, channel].shape)
        return numbers


class VisionLanguageModel:
    """A captioner in transformers on one device.  A family says how its inputs are made and its output is read.

    One thread of its own does all that the device does, because a captured CUDA graph belongs to the thread that
    captured it, and because OpenMP keeps a team of threads for each thread that computes.

    Attributes:
        family: What the file declares.
        processor_class: A class of transformers to use in place of the processor that it has for the model's type.
        half_overflows: Activations go beyond the range of float16.
        squeezes: Every image is resized to one rectangle.
        compiles: It is an encoder-decoder, whose step can be captured.
        unquantized: See UNQUANTIZED.
        asked: What the model is asked in words.
        compiled: What a receipt says of compiled code; None where there is none.
        wordings: The questions as the family puts them.
    """

    family: Family
    asked = ""
    compiled: Mapping[str, object] | None = None
    wordings: Sequence[Wording] = ()
    processor_class: str | None = None
    half_overflows = False
    squeezes = False
    compiles = False
    unquantized: tuple[str, ...] = UNQUANTIZED

    def __init__(self, source: str, settings: CaptionSettings) -> None:
        """Load the model.

        Args:
            source: A hub id or a folder.
            settings: How it is to work.

        Raises:
            InfrastructureError: The model cannot be loaded.  The message is one line.
            UsageError: The settings ask for what this family cannot do.
        """
        s = self.settings = settings
        device = s.device
        if s.compile != "none" and not self.compiles:
            raise UsageError(f"--compile {s.compile}: not for the family {self.family.name}: its inputs vary in length")
        if s.quantize and importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError(f"--quantize {s.quantize} needs the package bitsandbytes: {install('bitsandbytes')}")
        if s.offload and device != "cpu" and importlib.util.find_spec("accelerate") is None:
            raise InfrastructureError(f"--offload needs accelerate: {install('accelerate')}")
        if s.attention == "flash":
            _check_flash(device, s.dtype)
        self.source = resolve(source, s.revision, kind=TRANSFORMER, known=_known())
        self.name, self.revision, self.device = self.source.name, self.source.revision, device
        self._thread = ThreadPoolExecutor(1, "device")
        try:
            self._thread.submit(self._open, source).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _open(self, source: str) -> None:
        """In the thread of the device: load the model.  source: as it was given, for messages."""
        quiet_transformers()
        import torch
        from safetensors import SafetensorError

        s, device = self.settings, self.device
        self._torch = torch
        self._squares: SquareImages | None = None
        torch.set_num_threads(s.threads)
        self.device_kind = use_device(device)
        self._packer = Packer(device)
        self.dtype = self._choose_dtype(s.dtype)
        self._set_up_compiler()
        folder = local_folder(self.source)
        try:
            self.processor = self._load_processor(folder)
            self._squares = SquareImages.of(self.processor.image_processor) if self.squeezes else None
            self.model = self._load_model(folder)
            self._marks = marks_of(self.processor)
            self._special = special_ids(self.processor.tokenizer, self._marks)
            self.wordings = [self._with_special(self._configure(question)) for question in s.asked]
            self.asked = self.wordings[0].asked if self.family.chats else ""
            static = s.compile != "none"
            self._caches = StaticCaches(self.model.config.text_config) if static else None
            self._compile()
        except torch.OutOfMemoryError as error:
            text = f"--model {source}: does not fit on {device}; try --quantize or --offload"
            raise InfrastructureError(text) from error
        except SafetensorError as error:
            raise InfrastructureError(f"--model {source}: damaged weights: {hub_error_line(error)}") from error
        except _LOADING_ERRORS as error:
            raise InfrastructureError(f"--model {source}: cannot be loaded: {hub_error_line(error)}") from error

    @classmethod
    def weights(cls, source: str, revision: str | None) -> WeightsNeed:
        """See CaptionBackend."""

        def wanted(files: Sequence[HubFile]) -> list[HubFile]:
            loaded = (file for file in files if any(fnmatch(file.path, pattern) for pattern in MODEL_FILES))
            return sorted(loaded, key=lambda file: file.path)

        return whole_model(source, revision, None, TRANSFORMER, wanted, local_folder, _known())

    # ---- what a family may override

    def _configure(self, question: Question) -> Wording:
        """Prepare the text that goes with every image."""
        raise NotImplementedError

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        """Turn an RGB image and a text into the model's inputs.

        Args:
            image: The image.
            wording: From ``_configure``.
            said: The question about this image, where it is not the same for all.
        """
        raise NotImplementedError

    def _texts(self, sequences: Any, prompt_length: int, number: int) -> list[str]:
        """Read the captions from the tokens that ``generate`` returned.  number: of the question."""
        # After its end a row is padded, by some models with a word.
        rows = [row[: self._end(row)] for row in sequences[:, prompt_length:].tolist()]
        return self._decoded(rows, number)

    def _decoded(self, rows: Sequence[Sequence[int]], number: int = 0) -> list[str]:
        texts: list[str] = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _joined(self, rows: Sequence[Inputs]) -> dict[str, Any]:
        """The tensors of a batch; those that ``pack`` has joined may be on the device."""
        if (packed := together(rows)) is not None:
            return packed
        return {name: self._torch.cat([inputs.tensors[name] for inputs in rows]) for name in rows[0].tensors}

    def _pixels(self, image: Any) -> Any:
        """The image for a model that resizes every image to one rectangle: 1 × 3 × height × width."""
        if self._squares:
            return self._squares.bytes_of(image)
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"].to(self.dtype)

    def _padded(self, made: Mapping[str, Any], *, on_the_right: bool = False) -> dict[str, Any]:
        """The inputs of one image with all that has a value for each token padded to a length that others share."""
        length = made["input_ids"].shape[1]
        more = padded_length(length, self.settings.gather) - length
        sides = (0, more) if on_the_right else (more, 0)
        tensors = {}
        for name, tensor in made.items():
            if tensor.ndim == 2 and tensor.shape[1] == length and tensor.shape[0] == 1:
                value = self.generation.pad_token_id if name == "input_ids" else 0
                tensor = self._torch.nn.functional.pad(tensor, sides, value=value)
            tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensors

    def _images_encoder(self) -> Any:
        """The module that turns pixels into what the language model reads."""
        raise NotImplementedError

    # ---- CaptionBackend

    def prepare(self, image: Any, inquiry: Inquiry | None = None) -> Inputs:
        """See CaptionBackend."""
        wording = self.wordings[inquiry.number if inquiry else 0]
        filled = filled_for(wording.question, inquiry)
        try:
            said = None if filled is None else self._said(filled, wording)
            inputs = self._inputs(image if image.mode == "RGB" else image.convert("RGB"), wording, said)
        except MemoryError:
            raise SampleError("out_of_memory", f"preparing {image.width}×{image.height}") from None
        except _PROCESSOR_ERRORS as error:
            detail = f"{image.width}×{image.height}: {hub_error_line(error)}"
            raise SampleError("processor_refused", detail) from error
        if said is not None and (most := self._most_positions()):
            length, more = inputs.tensors["input_ids"].shape[1], 0 if self._reads_apart else wording.max_tokens
            if length + more > most:
                told = f"{length:,} tokens with the image's, and {more:,} for the caption; the model takes {most:,}"
                raise SampleError("prompt_too_long", told)
        return inputs

    def asked_of(self, number: int) -> str:
        """See CaptionBackend."""
        return self.wordings[number].asked if self.family.chats else ""

    def _said(self, filled: Filled, wording: Wording) -> str:
        """The question about one image.  Its values add no special token to those of its author.

        Raises:
            SampleError: ``prompt_refused``: they would, although their marks are broken.
        """
        said = filled.text(self._marks)
        if self._specials_of(said) != wording.special:
            raise SampleError("prompt_refused", "a field holds what the model's tokenizer reads as a special token")
        return said

    def _specials_of(self, text: str) -> tuple[int, ...]:
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(token for token in ids if token in self._special)

    def _with_special(self, wording: Wording) -> Wording:
        if (filled := filled_for(wording.question, None)) is None:
            return wording
        return replace(wording, special=self._specials_of(filled.text(self._marks)))

    @property
    def _reads_apart(self) -> bool:
        """Whether an encoder reads the prompt, whose positions the caption does not share."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def _most_positions(self) -> int:
        """How many tokens the model can take; 0 where it does not say."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", 0)
        return most if isinstance(most, int) else 0

    def pack(self, batch: Sequence[Inputs]) -> list[Inputs]:
        """See CaptionBackend."""
        return self._packer.pack(batch)

    def caption(
        self, batch: Sequence[Inputs], seeds: Sequence[int], attempt: Attempt = FIRST, number: int = 0
    ) -> list[Reply]:
        """See CaptionBackend."""
        return self._thread.submit(self._caption_or_explain, batch, seeds, attempt, number).result()

    def close(self) -> None:
        """See CaptionBackend."""
        self._thread.submit(self._unload).result()
        self._thread.shutdown()

    # ---- the device, in its thread

    def _caption_or_explain(
        self, batch: Sequence[Inputs], seeds: Sequence[int], attempt: Attempt, number: int
    ) -> list[Reply]:
        try:
            return self._caption(batch, seeds, attempt, number)
        except (RuntimeError, MemoryError, AssertionError) as error:
            if (shortage := shortage_of(error)) is None:
                raise self._explain(error) from error
        self._release()  # outside the handler, whose traceback keeps the tensors alive
        raise OutOfMemory(shortage.text, certain=shortage.certain)

    def _unload(self) -> None:
        del self.model
        self._release()

    def _caption(self, batch: Sequence[Inputs], seeds: Sequence[int], attempt: Attempt, number: int) -> list[Reply]:
        torch = self._torch
        wording = self.wordings[number]
        tokens = attempt.tokens(wording.max_tokens + wording.thought_tokens)
        rows = [*batch, *[batch[-1]] * (padded_rows(len(batch)) - len(batch) if self._caches else 0)]
        joined = self._joined(rows)
        moved = {name: self._to_device(tensor) for name, tensor in joined.items()}
        if self._squares:
            moved["pixel_values"] = self._squares.numbers_of(moved["pixel_values"], self.dtype)
        prompt_length = joined["input_ids"].shape[1]
        # The caches are kept for the next call, and compiled code refuses tensors that were made in inference mode.
        with torch.inference_mode() if self._caches is None else torch.no_grad():
            if self._caches:
                moved["past_key_values"] = self._caches.get(len(rows), prompt_length, tokens)
            settings = copy.deepcopy(self.generation)
            settings.update(max_new_tokens=tokens)
            choice = self._choice(seeds, len(rows), attempt, wording.question.temperature, tokens)
            sequences = self.model.generate(**moved, generation_config=settings, logits_processor=choice)
        sequences = sequences[: len(batch)]
        texts = self._texts(sequences, prompt_length, number)
        ended = self._ended(sequences, prompt_length, tokens)
        return [Reply(text, WHOLE if end else CUT) for text, end in zip(texts, ended, strict=True)]

    def _ended(self, sequences: Any, prompt_length: int, tokens: int) -> list[bool]:
        """Whether each caption ended before the bound on tokens."""
        # The decoder of an encoder-decoder begins with a token of its own, in some models the one that ends a text.
        first = 1 if getattr(self.model.config, "is_encoder_decoder", False) else prompt_length
        rows = sequences[:, first:].tolist()
        forced = self.generation.forced_eos_token_id is not None  # ``generate`` ends a text with it at the bound
        return [len(row) < tokens or self._end(row[: tokens - forced]) is not None for row in rows]

    def _end(self, row: Sequence[int]) -> int | None:
        """The place of the first token that ends a text; None where there is none."""
        ends = self.generation.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return next((place for place, token in enumerate(row) if token in ends), None)

    def _choice(self, seeds: Sequence[int], rows: int, attempt: Attempt, first: float, tokens: int) -> list[Any]:
        """The logits processors that choose a token, beside those of ``generate`` itself.

        first: the temperature of the first attempt.  tokens: of a caption.
        """
        processors: list[Any] = [NoRepeatedNgrams(self._ngram)] if self._ngram else []
        if (temperature := attempt.temperature(first)) > 0:
            padded = [*seeds, *[0] * (rows - len(seeds))]
            processors.append(SeededSampling(temperature, padded, tokens))
        return processors

    def _to_device(self, tensor: Any) -> Any:
        if self.device == "cpu" or tensor.device.type != "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _release(self) -> None:
        if self._caches:
            self._caches.clear()
        free_memory(self.device)

    def _explain(self, error: BaseException) -> BaseException:
        """A failing GPU ends this process with one line.  Anything else is a bug and keeps its traceback."""
        if broken := device_failure(error):
            return DeviceError(f"{self.device} ({self.device_kind}) failed: {broken}")
        if self.settings.compile != "none":
            return compiling.compiler_error(error, self.name) or error
        return error

    # ---- loading

    def _set_up_compiler(self) -> None:
        """A short try shows whether this machine can compile, before minutes are spent on the model."""
        s = self.settings
        if s.compile == "none" or self.device == "cpu":  # where keys only keep their places
            return
        deterministic = compiling.set_up(s.code_beside, self.device_kind)
        try:
            compiling.try_out(self.device, self.name, graphs=True)
        except RuntimeError as error:
            raise self._explain(error) from error
        self.compiled = compiling.note_of(s.compile, deterministic)

    def _compile(self) -> None:
        """``generate`` compiles the step itself, once for each size: with sizes that vary in one graph, the kernels
        would depend on which size came first."""
        from transformers import CompileConfig

        if self.compiled is None:
            return
        self.generation.compile_config = CompileConfig(dynamic=False)
        if self.settings.compile == "all":
            self._images_encoder().compile(dynamic=False)

    def _choose_dtype(self, dtype: str) -> Any:
        torch = self._torch
        if dtype != "auto":
            return getattr(torch, dtype)
        if self.device == "cpu":
            return torch.float32
        if torch.get_device_module(self.device).is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if self.half_overflows else torch.float16

    def _load_processor(self, folder: Path) -> Any:
        """The model's processor without its part for videos, which needs torchvision.  Pillow resizes the images, so
        that they have the same pixels on every machine."""
        from transformers import AutoConfig
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

        model_type = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
        kind = processor_class_from_name(self.processor_class or PROCESSOR_MAPPING_NAMES[model_type])
        images_only = type(
            kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])}
        )
        processor = images_only.from_pretrained(folder, local_files_only=True, backend="pil")  # type: ignore[attr-defined]
        processor.tokenizer.padding_side = "left"
        return processor

    def _load_model(self, folder: Path) -> Any:
        from transformers import AutoModelForImageTextToText

        arguments: dict[str, Any] = {}
        if self.settings.attention == "flash":
            arguments["attn_implementation"] = "flash_attention_2"
        if method := self._checked_method(folder):
            arguments["device_map"] = {"": self.device}
        if quantize := self.settings.quantize:
            arguments |= {"quantization_config": self._quantization(quantize), "device_map": {"": self.device}}
        if self.settings.offload:
            arguments |= self._placement()
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=self.dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
        if missing := sorted(found["missing_keys"]) or sorted(map(str, found["mismatched_keys"])):
            kind = type(model).__name__
            raise ValueError(f"its weights are not those of {kind} ({missing[0]} is missing or misshapen)")
        if "device_map" not in arguments:
            model.to(self.device)
        if method:
            self.dtype = model.dtype  # some kinds compute in another precision than was asked for
        model.eval()
        self.generation = self._generation(model.generation_config)
        return model

    def _checked_method(self, folder: Path) -> str | None:
        """The kind in which the checkpoint is quantised, None for none.  Raises where it cannot be loaded here."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        method = quantized.method_of(config)
        if method is not None:
            quantized.check(self.source.name, method, self.device, self.settings.quantize)
        return method

    def _placement(self) -> dict[str, Any]:
        """Put on the GPU what fits, from the first layer on.  Without a GPU everything is in the machine's memory."""
        if self.device == "cpu":
            return {}
        index = self._torch.device(self.device).index or 0
        free = int(self._torch.get_device_module(self.device).mem_get_info(index)[0] * _GPU_SHARE)
        return {"device_map": "auto", "max_memory": {index: free, "cpu": 1 << 50}}

    def _quantization(self, quantize: Quantize) -> Any:
        from transformers import BitsAndBytesConfig

        import_bitsandbytes()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line for each layer and call
        skip = [rf"(.*\.)?{name}" for name in self.unquantized]
        if quantize == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=self.dtype,
            llm_int8_skip_modules=skip,
        )

    def _generation(self, own: Any) -> Any:
        """The model's own generation config (its stop tokens and penalties) without its sampling and beams."""
        settings = copy.deepcopy(own)
        settings.update(do_sample=False, num_beams=1, max_length=None)
        settings.update(temperature=None, top_k=None, top_p=None, early_stopping=None)
        self._ngram = settings.no_repeat_ngram_size or 0
        settings.update(
            no_repeat_ngram_size=0
        )  # NoRepeatedNgrams does it; None would be filled in from the model again
        if settings.pad_token_id is None:
            settings.pad_token_id = self.processor.tokenizer.pad_token_id
        return settings


def special_ids(tokenizer: Any, marks: Collection[str]) -> frozenset[int]:
    """The tokens that no value of a field may add to a prompt: the special ones, and those of marks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {number for number, token in added.items() if token.special or token.content in marks}
    return frozenset((found | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})


def _check_flash(device: str, dtype: str) -> None:
    if not device.startswith("cuda"):
        raise UsageError("--attention flash: it needs a GPU, and this process computes on the CPU; leave it out")
    if dtype == "float32":
        raise UsageError("--attention flash: it needs 16 bits; leave out --dtype float32")
    if importlib.util.find_spec("flash_attn") is None:
        raise InfrastructureError(f"--attention flash needs the package flash-attn: {install('flash_attn')}")


def _known() -> tuple[Model, ...]:
    return known_models(backends.families("caption"))


def local_folder(source: ModelSource) -> Path:
    """The folder with a model's files.  A model of the hub is fetched into the hub's cache where it is not complete.

    The hub is not asked where the cache is complete, because compute nodes often have no network.

    Raises:
        InfrastructureError: The model cannot be fetched.
    """
    if source.is_folder:
        return Path(source.location)
    folder = snapshot(source.location, source.revision)
    if _is_whole(folder):
        return folder
    from huggingface_hub import snapshot_download

    arguments: dict[str, Any] = {"revision": source.revision, "allow_patterns": list(MODEL_FILES)}
    try:
        return Path(snapshot_download(source.location, **arguments))
    except hub_errors() as error:
        raise hub_trouble(error, source.location, source.revision, asked_by="--model", known=source.known) from error


def _is_whole(folder: Path) -> bool:
    """Whether the hub's client has fetched every file that is loaded.  It fetches them in any order."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        weights = set(index["weight_map"].values())
    except FileNotFoundError:
        weights = {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    either = (("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "tokenizer.model"))
    return all((folder / name).is_file() for name in {"config.json", "tokenizer_config.json", *weights}) and all(
        any((folder / name).is_file() for name in names) for names in either
    )


class ChatCaptioner(VisionLanguageModel):
    """A decoder-only model with a chat template.

    Attributes:
        prompts: What the model is asked, by ``detail``.
    """

    prompts: Mapping[Detail, str] = PROMPTS

    def _configure(self, question: Question) -> Wording:
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        if not template:
            raise ValueError("it has no chat template")
        max_tokens = question.max_tokens or self.family.max_tokens
        asked = words_of(question, self.settings, max_tokens, self.prompts)
        said = _PLACE if question.varies else asked
        text, begun, thought_tokens = self._prompt_without_thought(str(template), said)
        if question.varies and text.count(_PLACE) != 1:
            raise ValueError("its chat template does not take a question as it is: leave the fields out of the prompt")
        first = self.processor.tokenizer.bos_token
        self._adds_first = not (
            first and text.startswith(first)
        )  # some templates write it, others leave it to the tokenizer
        self._thoughts = reasoning.special_marks(self.processor.tokenizer)
        return Wording(question, asked, max_tokens, text, begun, thought_tokens)

    def _prompt_without_thought(self, template: str, said: str) -> tuple[str, str, int]:
        """The text for the model, the mark with which it begins the model's reasoning, "" where it does not, and the
        tokens of that reasoning.

        The reasoning is turned off where the template can do that.  Else there is room for it, and it is cut from the
        captions.
        """
        off = reasoning.switched_off(template)
        text = self._prompt(said, **off)
        begun = reasoning.begun_by(text, said)
        if not begun and (off or not reasoning.is_thinking_checkpoint(self.name)):
            return text, begun, 0
        logger.info(
            f"{self.name} reasons before it answers, and its chat template cannot turn that off: the reasoning, of "
            f"up to {reasoning.THOUGHT_TOKENS:,} tokens an image, is cut from the captions.  A checkpoint without it "
            "is several times as fast"
        )
        return text, begun, reasoning.THOUGHT_TOKENS

    def _prompt(self, said: str, **variables: bool) -> str:
        """The chat template filled in with a question.  variables: for the template, beside the messages."""
        content = [{"type": "image"}, {"type": "text", "text": said}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, **variables
        )
        return text

    def _decoded(self, rows: Sequence[Sequence[int]], number: int = 0) -> list[str]:
        begun = self.wordings[number].begun
        return [begun + text for text in reasoning.decoded(self.processor.tokenizer, rows, self._thoughts)]

    def _inputs(self, image: Any, wording: Wording, said: str | None) -> Inputs:
        # The place is in the text once, and what is put there is not looked at again.
        text = wording.text if said is None else said.join(wording.text.split(_PLACE))
        made = self._process(image, text)
        tensors = self._padded(made)
        return Inputs(tensors, (tensors["input_ids"].shape[1], *self._more_shape(tensors)))

    def _process(self, image: Any, text: str) -> Any:
        return self.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=self._adds_first)

    def _more_shape(self, tensors: dict[str, Any]) -> tuple[int, ...]:
        """What the inputs of two images must have in common, beside their length, to be joined into a batch."""
        return tuple(tensors["pixel_values"].shape[1:])
