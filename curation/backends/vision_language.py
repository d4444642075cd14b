"""What the captioners that run in transformers share: loading, one call of the device, seeded sampling."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.backends.hub_models import TRANSFORMER, ModelSource, quiet_transformers, resolve, snapshot
from curation.backends.square_images import SquareImages
from curation.captioning import FAMILIES, Detail, OutOfMemory, Quantize
from curation.device_memory import is_out_of_memory, use_device
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.weights import MODEL_FILES, hub_error_line, hub_errors

_WHOLE = ["vision_tower", "visual", "vision_model", "multi_modal_projector", "lm_head"]  # stay in 16 bits: few, frail
_GPU_SHARE = 0.7  # of the free memory, for weights under --offload; the rest is for what they compute
_LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError)
_PROCESSOR_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One image as the model takes it: tensors on the host, each with a first dimension to join a batch along."""

    tensors: dict[str, Any]
    shape: tuple[int, ...]


class VisionLanguageModel:
    """A captioner in transformers on one device; a family says how its inputs are made and its output read.

    source: a hub id or a folder.  prompt: in place of the family's own for ``detail``.
    max_tokens: None for the family's.  temperature: 0 takes the likeliest token, else each image's seed decides.
    quantize: the language model's weights in 4 or 8 bits (bitsandbytes, CUDA).  offload: what does not fit on the GPU
    stays in the machine's memory and travels when it is its turn.  dtype: a torch dtype's name, or ``auto``.
    Raises InfrastructureError, one line, where it cannot be loaded, and UsageError for what cannot be done.
    """

    family = ""
    half_overflows = False  # activations beyond float16's range
    squeezes = False  # every image into one rectangle

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
    ) -> None:
        if quantize:
            _insist_on_bitsandbytes(quantize, device)
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
        joined = {name: torch.cat([inputs.tensors[name] for inputs in batch]) for name in batch[0].tensors}
        moved = {name: self._to_device(tensor) for name, tensor in joined.items()}
        if self._squares:
            moved["pixel_values"] = self._squares.numbers_of(moved["pixel_values"], self.dtype)
        processors = [SeededSampling(self.temperature, seeds, self.max_tokens)] if self.temperature > 0 else []
        with torch.inference_mode():
            sequences = self.model.generate(**moved, generation_config=self.generation, logits_processor=processors)
        return self._texts(sequences, joined["input_ids"].shape[1])

    def _to_device(self, tensor: Any) -> Any:
        if not self.device.startswith("cuda"):
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _release(self) -> None:
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
        if offload and self.device.startswith("cuda"):
            index = self._torch.device(self.device).index or 0
            free = int(self._torch.cuda.mem_get_info(index)[0] * _GPU_SHARE)
            arguments |= {"device_map": "auto", "max_memory": {index: free, "cpu": 1 << 50}}
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

    def _quantization(self, quantize: Quantize) -> Any:
        from transformers import BitsAndBytesConfig

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
        if settings.pad_token_id is None:
            settings.pad_token_id = self.processor.tokenizer.pad_token_id
        return settings


class SeededSampling:
    """A logits processor that draws each image's tokens from its own seed, whatever batch it is in.

    ``generate`` would draw a whole batch from one generator.  Here the draw is made beforehand: a row's uniform numbers
    come from its seed, on the host, and pick from the distribution that its logits give at ``temperature``.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], most_tokens: int) -> None:
        import torch

        draws = [torch.rand(most_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._torch = torch
        self._uniform = torch.stack(draws, 1).double()  # step × row
        self._temperature = temperature
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        torch = self._torch
        self._uniform = self._uniform.to(scores.device)
        cumulated = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        target = self._uniform[self._step, :, None] * cumulated[:, -1:]
        self._step += 1
        chosen = torch.searchsorted(cumulated, target, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _insist_on_bitsandbytes(quantize: str, device: str) -> None:
    if not device.startswith("cuda"):
        raise UsageError(f"--quantize {quantize}: works on CUDA GPUs only, and this is {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InfrastructureError(f"--quantize {quantize} needs bitsandbytes: pip install bitsandbytes")


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
