"""What the captioners that run in transformers share: loading, one call of the device, seeded sampling.

Captions by models that chat: the question that goes with an image, and inputs padded to few lengths.

Images that a model wants squeezed into one rectangle: resized on the host, made numbers on the device.

A processor of transformers does all of it on the host: three times the time, and four times the bytes to move.  The
numbers are the same to the last bit in float32.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from curation.backends.caption.decoding import NoRepeatedNgrams, SeededSampling, StaticCaches, padded_rows
from curation.caption.captioner import FAMILIES, Compile, Detail, OutOfMemory, Quantize
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.models.batch_size import is_out_of_memory, use_device
from curation.models.hub_cache import (
    TRANSFORMER,
    ModelSource,
    import_bitsandbytes,
    quiet_transformers,
    resolve,
    snapshot,
)
from curation.models.needs import HubFile, WeightsNeed, whole_model
from curation.models.weights import MODEL_FILES, hub_error_line, hub_errors


class SquareImages:
    """The part of an image processor that is left on the host, and the part that is not."""

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
        """None where the processor does more than resize to one size, rescale and normalise."""
        size = getattr(processor, "size", None) or {}
        has_size = all(name in size and size[name] for name in ("height", "width"))
        more = ("do_center_crop", "do_pad", "do_pan_and_scan")
        if not (has_size and processor.do_resize) or any(getattr(processor, name, False) for name in more):
            return None
        return cls(processor)

    def bytes_of(self, image: Any) -> Any:
        """1 × 3 × height × width, uint8.  By numpy: torch would begin a team of threads for each that prepares."""
        import torch

        pixels = np.asarray(image.resize(self._size, self._resample))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])

    def numbers_of(self, pixels: Any, dtype: Any) -> Any:
        """Those bytes as the model takes them, on whatever device they are."""
        import torch

        table = self._table.to(pixels.device, dtype)
        numbers = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
        for channel in range(3):
            found = table[channel].index_select(0, pixels[:, channel].reshape(-1).int())
            numbers[:, channel] = found.view(numbers[:, channel].shape)
        return numbers


# Modules that stay in 16 bits, being few and frail, as patterns of their whole names.
_WHOLE = [rf"(.*\.)?{name}" for name in ("vision_tower", "visual", "vision_model", "multi_modal_projector", "lm_head")]


_GPU_SHARE = 0.7  # of the free memory, for weights under --offload; the rest is for what they compute


_LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError)


_PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One image as the model takes it: tensors on the host, each with a first dimension to join a batch along."""

    tensors: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class VisionLanguageModel:
    """A captioner in transformers on one device; a family says how its inputs are made and its output read.

    source: a hub id or a folder.  prompt: in place of the family's own for ``detail``.
    max_tokens: None for the family's.  temperature: 0 takes the likeliest token, else each image's seed decides.
    quantize: the language model's weights in 4 or 8 bits (bitsandbytes).  offload: what does not fit on the GPU stays
    in the machine's memory and travels when it is its turn.  dtype: a torch dtype's name, or ``auto``.
    compile: ``decode``: keys and values stay in place, and on a GPU each step is one captured graph; ``all``: the
    images' encoder is compiled too.
    Raises InfrastructureError, one line, where it cannot be loaded, and UsageError for what cannot be done.
    """

    family = ""
    half_overflows = False  # activations beyond float16's range
    squeezes = False  # every image into one rectangle
    compiles = False  # an encoder-decoder whose step can be captured

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        prompt: str | None = None,
        detail: Detail = "more_detailed",
        max_tokens: int | None = None,
        temperature: float = 0.0,
        quantize: Quantize | None = None,
        offload: bool = False,
        device: str = "cpu",
        threads: int = 1,
        dtype: str = "auto",
        compile: Compile = "none",
    ) -> None:
        if compile != "none" and not self.compiles:
            raise UsageError(f"--compile {compile}: not for the family {self.family}, whose images are of many lengths")
        if quantize:
            _require_bitsandbytes(quantize)
        if offload and device.startswith("cuda") and importlib.util.find_spec("accelerate") is None:
            raise InfrastructureError("--offload needs accelerate: pip install accelerate")
        self.source = resolve(source, revision, kind=TRANSFORMER)
        self.name, self.revision = self.source.name, self.source.revision
        self.device, self.detail, self.temperature = device, detail, temperature
        self.max_tokens = max_tokens or FAMILIES[self.family].max_tokens
        quiet_transformers()
        import torch
        from safetensors import SafetensorError

        self._torch = torch
        self._squares: SquareImages | None = None
        torch.set_num_threads(threads)
        self.device_kind = use_device(device)
        self.dtype = self._choose_dtype(dtype)
        folder = local_folder(self.source)
        try:
            self.processor = self._load_processor(folder)
            self._squares = SquareImages.of(self.processor.image_processor) if self.squeezes else None
            self.model = self._load_model(folder, quantize, offload)
            self._configure(prompt)
            self._caches = None if compile == "none" else StaticCaches(self.model.config.text_config, self.max_tokens)
            if compile == "all" and device.startswith("cuda"):
                self._images_encoder().compile(dynamic=False)
        except torch.OutOfMemoryError as error:
            text = f"--model {source}: does not fit on {device}; try --quantize or --offload"
            raise InfrastructureError(text) from error
        except SafetensorError as error:
            raise InfrastructureError(f"--model {source}: damaged weights: {hub_error_line(error)}") from error
        except _LOADING_ERRORS as error:
            raise InfrastructureError(f"--model {source}: cannot be loaded: {hub_error_line(error)}") from error

    # ---- what a family may override

    def _configure(self, prompt: str | None) -> None:
        """Prepare the text that goes with every image."""
        raise NotImplementedError

    def _inputs(self, image: Any) -> Inputs:
        raise NotImplementedError

    def _texts(self, sequences: Any, prompt_length: int) -> list[str]:
        """The captions in what ``generate`` gave."""
        ends = self.generation.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        rows = []
        for row in sequences[:, prompt_length:].tolist():  # behind its end a row is padded, by some models with a word
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            rows.append(row[:end])
        texts: list[str] = self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _pixels(self, image: Any) -> Any:
        """The image for a model that squeezes, 1 × 3 × height × width."""
        if self._squares:
            return self._squares.bytes_of(image)
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"].to(self.dtype)

    def _images_encoder(self) -> Any:
        """The module that turns pixels into what the language model reads."""
        raise NotImplementedError

    # ---- the seam of curation.captioning

    def prepare(self, image: Any) -> Inputs:
        """See CaptionBackend."""
        try:
            return self._inputs(image if image.mode == "RGB" else image.convert("RGB"))
        except MemoryError:
            raise SampleError("out_of_memory", f"preparing {image.width}×{image.height}") from None
        except _PROCESSOR_ERRORS as error:
            detail = f"{image.width}×{image.height}: {hub_error_line(error)}"
            raise SampleError("processor_refused", detail) from error

    def caption(self, batch: Sequence[Inputs], seeds: Sequence[int]) -> list[str]:
        """See CaptionBackend."""
        try:
            return self._caption(batch, seeds)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise self._explain(error) from error
            said = hub_error_line(error)
        self._release()  # outside the handler, whose traceback keeps the tensors alive
        raise OutOfMemory(said)

    def close(self) -> None:
        del self.model
        self._release()

    # ---- the device

    def _caption(self, batch: Sequence[Inputs], seeds: Sequence[int]) -> list[str]:
        torch = self._torch
        rows = [*batch, *[batch[-1]] * (padded_rows(len(batch)) - len(batch) if self._caches else 0)]
        joined = {name: torch.cat([inputs.tensors[name] for inputs in rows]) for name in rows[0].tensors}
        moved = {name: self._to_device(tensor) for name, tensor in joined.items()}
        if self._squares:
            moved["pixel_values"] = self._squares.numbers_of(moved["pixel_values"], self.dtype)
        prompt_length = joined["input_ids"].shape[1]
        # What is kept for the next call must not be of inference mode: compiled code would refuse it.
        with torch.inference_mode() if self._caches is None else torch.no_grad():
            if self._caches:
                moved["past_key_values"] = self._caches.get(len(rows), prompt_length)
            sequences = self.model.generate(
                **moved, generation_config=self.generation, logits_processor=self._choice(seeds, len(rows))
            )
        return self._texts(sequences[: len(batch)], prompt_length)

    def _choice(self, seeds: Sequence[int], rows: int) -> list[Any]:
        """What decides a token, but for what ``generate`` itself does to its scores."""
        processors: list[Any] = [NoRepeatedNgrams(self._ngram)] if self._ngram else []
        if self.temperature > 0:
            padded = [*seeds, *[0] * (rows - len(seeds))]
            processors.append(SeededSampling(self.temperature, padded, self.max_tokens))
        return processors

    def _to_device(self, tensor: Any) -> Any:
        if not self.device.startswith("cuda"):
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _release(self) -> None:
        if self._caches:
            self._caches.clear()
        gc.collect()
        if self.device.startswith("cuda"):
            self._torch.cuda.empty_cache()

    def _explain(self, error: BaseException) -> BaseException:
        """A failing GPU ends the run in one line; anything else is a bug and keeps its traceback."""
        if isinstance(error, getattr(self._torch, "AcceleratorError", ())) or "CUDA error" in str(error):
            return InfrastructureError(f"{self.device} ({self.device_kind}) failed: {hub_error_line(error)}")
        return error

    # ---- loading

    def _choose_dtype(self, dtype: str) -> Any:
        torch = self._torch
        if dtype != "auto":
            return getattr(torch, dtype)
        if not self.device.startswith("cuda"):
            return torch.float32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if self.half_overflows else torch.float16

    def _load_processor(self, folder: Path) -> Any:
        """The model's processor, for images alone and with Pillow: the same pixels on every machine, and none of
        torchvision, on which the video half of some processors insists."""
        from transformers import AutoConfig
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

        model_type = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
        kind = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
        images_only = type(
            kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])}
        )
        processor = images_only.from_pretrained(folder, local_files_only=True, backend="pil")  # type: ignore[attr-defined]
        processor.tokenizer.padding_side = "left"
        return processor

    def _load_model(self, folder: Path, quantize: Quantize | None, offload: bool) -> Any:
        from transformers import AutoModelForImageTextToText

        arguments: dict[str, Any] = {}
        if quantize:
            arguments |= {"quantization_config": self._quantization(quantize), "device_map": {"": self.device}}
        if offload:
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
        model.eval()
        self.generation = self._generation(model.generation_config)
        return model

    def _placement(self) -> dict[str, Any]:
        """What fits goes on the GPU, from the first layer on.  Without one there is nothing to take it from."""
        if not self.device.startswith("cuda"):
            return {}
        index = self._torch.device(self.device).index or 0
        free = int(self._torch.cuda.mem_get_info(index)[0] * _GPU_SHARE)
        return {"device_map": "auto", "max_memory": {index: free, "cpu": 1 << 50}}

    def _quantization(self, quantize: Quantize) -> Any:
        from transformers import BitsAndBytesConfig

        import_bitsandbytes()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line a layer and call: inputs become float16

        if quantize == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_WHOLE)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=self.dtype,
            llm_int8_skip_modules=_WHOLE,
        )

    def _generation(self, own: Any) -> Any:
        """The model's own rules (its stop tokens, penalties) without its sampling and beams."""
        settings = copy.deepcopy(own)
        settings.update(do_sample=False, num_beams=1, max_new_tokens=self.max_tokens, max_length=None)
        settings.update(temperature=None, top_k=None, top_p=None, early_stopping=None)
        self._ngram = settings.no_repeat_ngram_size or 0
        settings.update(no_repeat_ngram_size=0)  # see NoRepeatedNgrams; None would be filled in from the model again
        if settings.pad_token_id is None:
            settings.pad_token_id = self.processor.tokenizer.pad_token_id
        return settings


def _require_bitsandbytes(quantize: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--quantize {quantize} needs the package bitsandbytes: pip install -e '.[quantize]'")


def local_folder(source: ModelSource) -> Path:
    """The model's folder: its own, or one of the hub's cache, filled if need be (the hub's client locks).

    What is whole there is taken without asking the hub: compute nodes often have no network.
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
        raise InfrastructureError(f"--model {source.location}: download failed: {hub_error_line(error)}") from error


def captioner_weights(model: str, revision: str | None) -> WeightsNeed:
    """A captioner of transformers, in the hub's cache or in a folder: what is loaded, no pickles and no code."""

    def wanted(files: Sequence[HubFile]) -> list[HubFile]:
        loaded = (file for file in files if any(fnmatch(file.path, pattern) for pattern in MODEL_FILES))
        return sorted(loaded, key=lambda file: file.path)

    return whole_model(model, revision, None, TRANSFORMER, wanted, local_folder)


def _is_whole(folder: Path) -> bool:
    """Whether the hub's client has fetched all that is loaded: it fetches file by file, in any order."""
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
