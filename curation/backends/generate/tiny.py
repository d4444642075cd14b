"""A small text-to-image pipeline in diffusers format, built offline, with random weights: its pictures are noise.

It stands in for a real model if none is there (``--embedded``, the demo, tests), and it is loaded from its folder
by the same code as a real one.  1.4 MB, about 30 ms a picture of 256×256 on one core.  The prompt is written over each
picture, so that people see which prompt a picture belongs to, and that no model has drawn it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import xxhash

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate import diffusers
from curation.backends.generate.calls import Texts
from curation.backends.generate.lettering import written_over
from curation.backends.generate.loading import quiet_libraries
from curation.backends.generate.presets import Preset
from curation.errors import InfrastructureError
from curation.libraries import np
from curation.models.hub_cache import ModelSource
from curation.models.needs import WeightsNeed
from curation.models.weights import user_cache

if TYPE_CHECKING:
    import numpy.typing as npt

BUILDER_VERSION = 1  # raised when the same libraries give other bytes


NAME = "tiny-sd"
LABEL = "stand-in"  # written over each picture, before its prompt


class LetteredImages(diffusers.Images):
    """Pictures with their prompts written over them."""

    def __init__(self, images: diffusers.Images, prompts: Sequence[str]) -> None:
        self._images = images
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Picture ``index``, height × width × 3.  Raises SampleError as the pictures under it do."""
        return written_over(self._images.image(index), LABEL, self._prompts[index])


class Backend(diffusers.Backend):
    """The embedded pipeline, built before it is loaded.  It runs on the CPU where this torch cannot use a GPU."""

    presets: ClassVar = {
        NAME: Preset(
            model=f"embedded/{NAME}",
            steps=1,
            guidance=0.0,
            height=256,
            width=256,
            dtype="float32",
            batch_size=8,
            licence="none needed: random weights",
        )
    }

    is_stand_in = True

    def __init__(self, source: ModelSource, settings: Preset, *, device: str = "cpu", **others: Any) -> None:
        import torch

        build_embedded(source)
        super().__init__(source, settings, device=device if torch.cuda.is_available() else "cpu", **others)

    def generate(
        self,
        requests: Sequence[diffusers.Request],
        width: int,
        height: int,
        texts: Texts | None = None,
        check_stop: Callable[[], None] | None = None,
    ) -> diffusers.Images:
        """Noise for the requests, with their prompts written over it."""
        images = super().generate(requests, width, height, texts, check_stop)
        return LetteredImages(images, [request.prompt for request in requests])

    @classmethod
    def find(cls, model: str, revision: str | None, variant: str | None, config: str | None = None) -> ModelSource:
        return embedded_source()

    @classmethod
    def weights(cls, model: str, revision: str | None, variant: str | None, config: str | None = None) -> WeightsNeed:
        return _Embedded(embedded_source())


@dataclass(frozen=True, slots=True)
class _Embedded:
    """The embedded pipeline as a need: it is built in place of being fetched."""

    source: ModelSource

    def fetch(self, *, dry_run: bool) -> None:
        if not dry_run:
            build_embedded(self.source)
        print(f"{self.source.location}: --embedded is built, not fetched")


def embedded_source() -> ModelSource:
    """The embedded pipeline as a model; ``build_embedded`` fills its folder before it is loaded.

    It lies in the user's cache folder, under a name with the versions that its configuration files mention, so that an
    upgrade of a library builds another.
    """
    libraries = "-".join(importlib.metadata.version(name) for name in ("diffusers", "transformers"))
    folder = user_cache() / f"{BUILDER_VERSION}-{libraries}" / NAME
    return ModelSource(name=f"embedded/{NAME}", location=str(folder), revision=str(BUILDER_VERSION))


def build_embedded(source: ModelSource) -> None:
    """Build the embedded pipeline unless it is there: seconds; safe with many processes at once.

    Raises InfrastructureError when nothing can be written.
    """
    try:
        build_atomically(Path(source.location), save_tiny_sd)
    except OSError as error:
        text = f"{source.location}: the embedded pipeline cannot be built: {error.strerror or error}"
        raise InfrastructureError(text) from error


def build_atomically(folder: Path, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill a folder beside ``folder`` and rename it there; the first wins, nobody sees half of it."""
    if (folder / "model_index.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        build(temporary)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes 0600; a shared cache is for all
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError, OSError):  # ENOTEMPTY: another process was first
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (folder / "model_index.json").is_file():
        raise OSError(f"{folder} could not be put in its place")


def save_tiny_sd(folder: Path) -> None:
    """A Stable Diffusion pipeline: latents of an eighth of the side, a UNet of two levels, a tokenizer of bytes."""
    quiet_libraries()
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    text_encoder = CLIPTextModel(clip_text_config(CLIPTextConfig, tokenizer))
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    for seed, module in enumerate((text_encoder, unet, vae)):
        fill_with_noise(module, seed)
    strengthen(vae.decoder.conv_out.weight, 1.2)  # colours instead of greys
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    quiet_save(pipeline, folder)


def quiet_save(pipeline: Any, folder: Path) -> None:
    """``save_pretrained`` without its bars."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)


def fill_with_noise(module: Any, seed: int) -> None:
    """Random weights whose every byte is the same on every machine and with every library version: matrices normal with
    deviation 1/√fan-in, so that activations keep their size; norms one, biases zero."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            rng = np.random.Generator(np.random.PCG64([seed, xxhash.xxh3_64_intdigest(name.encode())]))
            values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.copy_(torch.from_numpy(values / np.float32(np.sqrt(parameter[0].numel()))))


def strengthen(parameter: Any, factor: float) -> None:
    """Multiply a weight in place."""
    import torch

    with torch.no_grad():
        parameter.mul_(factor)


def clip_tokenizer() -> Any:
    """CLIP's tokenizer without merges: every byte of the prompt is a token.  77 tokens, as CLIP's."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's tokenizer over single ASCII letters, for pipelines that are built offline."""
    from transformers import T5TokenizerFast

    letters = [("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127))]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=4)


def clip_text_config(kind: Any, tokenizer: Any, hidden_size: int = 32) -> Any:
    """A two-layer CLIP text model over that tokenizer."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
