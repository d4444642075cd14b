"""What is put into a pipeline that its model does not bring: LoRAs, another VAE, and weights in 8 bits.

All of it changes the pictures.  So it is asked for, and recorded with every picture.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from curation.backends.generate.calls import denoiser_of
from curation.backends.generate.presets import MANY_STEPS, says_few_steps
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.jsonio import parse_json_object
from curation.models.hub_cache import file_digest, folder_digest, public_name
from curation.models.hub_errors import hub_error_line
from curation.models.needs import WeightsBySource, WeightsNeed
from curation.models.weights import CACHE, fetch_weights, hub_parts

Quantize = Literal["fp8"]

MOST_SCALE = 10.0
_SCALED = re.compile(r"(?P<source>.+):(?P<scale>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf|nan)")
_LORA_FILE = "pytorch_lora_weights.safetensors"
_FP8_CAPABILITY = (8, 9)  # NVIDIA Ada and Hopper


@dataclass(frozen=True, slots=True)
class TinyVae:
    """A small autoencoder by madebyollin in place of a VAE.  scaling_factor: of the VAE that it stands for."""

    source: str
    scaling_factor: float


TINY_VAES: Mapping[str, TinyVae] = MappingProxyType(
    {
        "taesd": TinyVae("madebyollin/taesd", 0.18215),
        "taesdxl": TinyVae("madebyollin/taesdxl", 0.13025),
        "taesd3": TinyVae("madebyollin/taesd3", 1.5305),
        "taef1": TinyVae("madebyollin/taef1", 0.3611),
    }
)
"""Names for ``--vae``: the four latent spaces have the same shapes (the last two), and would be confused unnoticed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Weights that a flag names.

    Attributes:
        name: What the dataset records: a hub id, or a file's or folder's name.
        path: A file or a folder.
        digest: Of its content.
        scale: How strongly it is added; of a LoRA.
    """

    name: str
    path: Path
    digest: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that is put into a pipeline.

    Attributes:
        loras: In the order in which they were given.
        vae: The autoencoder in place of the model's own.
        quantize: ``fp8``: the denoiser's large matrices and what they multiply are in 8 bits.
    """

    loras: tuple[Part, ...] = ()
    vae: Part | None = None
    quantize: Quantize | None = None

    def record(self) -> dict[str, Any]:
        """What the options and every sample record; only what was asked for."""
        record: dict[str, Any] = {}
        if self.loras:
            record["lora"] = [{"name": one.name, "digest": one.digest, "scale": one.scale} for one in self.loras]
        if self.vae:
            record["vae"] = {"name": self.vae.name, "digest": self.vae.digest}
        if self.quantize:
            record["quantize"] = self.quantize
        return record


def lora_parts(value: str) -> tuple[str, float]:
    """``PATH:scale`` of ``--lora`` in its two parts; the scale is 1 where there is none.

    Raises UsageError for a scale that is 0, not finite, or larger than ``MOST_SCALE``.
    """
    found = _SCALED.fullmatch(value)
    source, scale = (found["source"], float(found["scale"])) if found else (value, 1.0)
    if not math.isfinite(scale) or not 0 < abs(scale) <= MOST_SCALE:
        raise UsageError(f"--lora {value}: the scale behind the colon must be between -{MOST_SCALE:g} and "
                         f"{MOST_SCALE:g}, and not 0")  # fmt: skip
    return source, scale


def few_steps_warnings(loras: Sequence[str], steps: int) -> list[str]:
    """Lines about LoRAs of distilled models, such as Lightning, where the model makes many steps."""
    names = [_name(lora_parts(value)[0]) for value in loras] if steps > MANY_STEPS else []
    return [
        f"--lora {name}: by its name it needs few steps, and the model makes {steps}: its card says which --steps and "
        "--guidance to give"
        for name in names
        if says_few_steps(name)
    ]


def vae_source(value: str) -> str:
    """A name for ``--vae`` as its hub id; a path or a hub id stays as it is."""
    return TINY_VAES[value].source if value in TINY_VAES and not Path(value).is_dir() else value


def find_parts(loras: Sequence[str], vae: str | None, quantize: Quantize | None) -> Parts:
    """Find what the flags name, or fetch it from the hub.

    Raises:
        UsageError: A scale is out of bounds.
        InfrastructureError: Weights are not there, or are no safetensors.
    """
    found = []
    for value in loras:
        source, scale = lora_parts(value)
        path = _lora_file(source)
        found.append(Part(_name(source), path, file_digest(path, "--lora"), scale))
    return Parts(loras=tuple(found), vae=_find_vae(vae) if vae else None, quantize=quantize)


def parts_weights(loras: Sequence[str], vae: str | None) -> list[WeightsNeed]:
    """What the flags need on this machine."""
    needs: list[WeightsNeed] = [WeightsBySource("--lora", lora_parts(value)[0]) for value in loras]
    return [*needs, WeightsBySource("--vae", vae_source(vae))] if vae else needs


def _lora_file(source: str) -> Path:
    path = fetch_weights(source, None, CACHE, name="--lora")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        usual = [file for file in files if file.name == _LORA_FILE]
        if len(usual or files) != 1:
            what = f"{len(files)} files of safetensors, none of them {_LORA_FILE}" if files else "no safetensors"
            name = f"{source}:{files[0].name}" if files and not Path(source).exists() else f"{source}/NAME.safetensors"
            raise InfrastructureError(f"--lora {source}: has {what}; name one file, such as {name}")
        path = (usual or files)[0]
    if path.suffix != ".safetensors":
        raise InfrastructureError(f"--lora {source}: {path.name} is no file of safetensors; only these are loaded")
    return path


def _find_vae(value: str) -> Part:
    source = vae_source(value)
    path = fetch_weights(source, None, CACHE, name="--vae")
    if path.is_dir() and (path / "vae" / "config.json").is_file():  # a whole pipeline
        path = path / "vae"
    if not (path / "config.json").is_file():
        raise InfrastructureError(f"--vae {value}: is no autoencoder of diffusers (it has no config.json)")
    return Part(_name(source), path, folder_digest(path))


def _name(source: str) -> str:
    """What the dataset records: no path of this machine."""
    path = Path(source).expanduser().absolute()
    if path.exists():
        return path.name if path.is_file() else public_name(str(path))
    return hub_parts("", source)[0]


# ---- into the pipeline


def put_in(pipeline: Any, parts: Parts, device: str) -> None:
    """Change a loaded pipeline: LoRAs are added to its weights, then the VAE takes the place of its own.

    Raises:
        UsageError: They do not fit the model.
        InfrastructureError: They cannot be loaded, or a package is missing.
    """
    if parts.loras:
        _fuse_loras(pipeline, parts.loras)
    if parts.vae:
        _replace_vae(pipeline, parts.vae, device)


def _fuse_loras(pipeline: Any, loras: Sequence[Part]) -> None:
    """Add the LoRAs to the weights: then they cost nothing, and compiling and 8 bits work as without them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights") or not hasattr(pipeline, "fuse_lora"):
        raise UsageError(f"--lora: {name} takes none")
    if importlib.util.find_spec("peft") is None:
        raise InfrastructureError("--lora: needs the package peft: pip install peft")
    adapters = [f"lora_{number}" for number in range(len(loras))]
    for adapter, lora in zip(adapters, loras, strict=True):
        try:
            pipeline.load_lora_weights(load_file(lora.path), adapter_name=adapter)
        except (SafetensorError, OSError) as error:
            raise InfrastructureError(f"--lora {lora.name}: damaged weights: {hub_error_line(error)}") from error
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            line = hub_error_line(error)
            raise InfrastructureError(f"--lora {lora.name}: is not for this model ({name}): {line}") from error
        if not any(adapter in found for found in pipeline.get_list_adapters().values()):
            raise InfrastructureError(f"--lora {lora.name}: has no weights for this model ({name})")
    pipeline.set_adapters(adapters, [lora.scale for lora in loras])
    pipeline.fuse_lora(adapter_names=adapters)
    pipeline.unload_lora_weights()


def _replace_vae(pipeline: Any, part: Part, device: str) -> None:
    import diffusers

    own = getattr(pipeline, "vae", None)
    if own is None:
        raise UsageError(f"--vae: {type(pipeline).__name__} has none")
    try:
        config = parse_json_object((part.path / "config.json").read_bytes())
    except (OSError, SampleError) as error:
        raise InfrastructureError(f"--vae {part.name}: config.json cannot be read: {error}") from error
    allowed = ("AutoencoderTiny", "AutoencoderKL", type(own).__name__)
    name = config.get("_class_name")
    if name not in allowed:
        kinds = " or ".join(dict.fromkeys(allowed))
        raise UsageError(f"--vae {part.name}: is {str(name)[:80]!r}; {type(pipeline).__name__} takes {kinds}")
    try:
        vae = getattr(diffusers, name).from_pretrained(
            str(part.path), dtype=own.dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise InfrastructureError(f"--vae {part.name}: cannot be loaded: {hub_error_line(error)}") from error
    _check_latents(own, vae, part.name)
    pipeline.register_modules(vae=vae.to(device))


def _check_latents(own: Any, vae: Any, name: str) -> None:
    """Raise UsageError unless a VAE decodes the latents of the model's own."""
    for entry in ("latent_channels", "z_dim"):
        wanted, has = getattr(own.config, entry, None), getattr(vae.config, entry, None)
        if wanted is not None and has is not None and wanted != has:
            raise UsageError(f"--vae {name}: decodes latents of {has} channels; this model's have {wanted}")
    halvings = [len(getattr(one.config, "block_out_channels", ())) for one in (own, vae)]
    if all(halvings) and halvings[0] != halvings[1]:
        shrunk = [2 ** (number - 1) for number in halvings]
        raise UsageError(f"--vae {name}: enlarges its latents {shrunk[1]} times; this model's need {shrunk[0]} times")
    scale = getattr(own.config, "scaling_factor", None)
    tiny = next((one for short, one in TINY_VAES.items() if name in (short, one.source)), None)
    stands_for = tiny.scaling_factor if tiny else getattr(vae.config, "scaling_factor", None)
    if type(vae).__name__ == "AutoencoderTiny" and tiny is None:
        return  # it scales latents itself, and its configuration does not say whose they are
    if scale is not None and stands_for is not None and not math.isclose(scale, stands_for, rel_tol=1e-3):
        fits = [short for short, one in TINY_VAES.items() if math.isclose(scale, one.scaling_factor, rel_tol=1e-3)]
        hint = f"; use --vae {fits[0]}" if fits else ""
        raise UsageError(
            f"--vae {name}: is for other latents (scaled by {stands_for:g}; this model's are by {scale:g}){hint}"
        )


# ---- 8 bits


def check_fp8(dtype: str, device: str) -> None:
    """Find out, before a model is loaded, whether ``--quantize fp8`` works here.

    Raises:
        UsageError: The precision is not bfloat16.
        InfrastructureError: torchao is missing, or the device does not multiply in 8 bits.
    """
    import torch

    if dtype != "bfloat16":
        raise UsageError(f"--quantize fp8: needs --dtype bfloat16, not {dtype}")
    if importlib.util.find_spec("torchao") is None:
        raise InfrastructureError("--quantize fp8: needs the package torchao: pip install torchao")
    if not device.startswith("cuda"):
        raise InfrastructureError("--quantize fp8: needs a GPU that multiplies in 8 bits; leave it out on a CPU")
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _FP8_CAPABILITY:
        have, need = (".".join(map(str, one)) for one in (capability, _FP8_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        raise InfrastructureError(
            f"--quantize fp8: {name} has compute capability {have}, and {need} is needed (NVIDIA Ada, Hopper or newer)"
        )


def quantize_fp8(pipeline: Any) -> None:
    """Have the denoiser's blocks multiply in 8 bits: weights and inputs with a scale for each row.

    Raises InfrastructureError where torchao refuses the device.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    try:
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        quantize_(denoiser_of(pipeline), config, filter_fn=is_large_matrix)
    except (AssertionError, NotImplementedError) as error:
        raise InfrastructureError(f"--quantize fp8: {hub_error_line(error)}") from error


def is_large_matrix(module: Any, name: str) -> bool:
    """Whether it is a linear layer of a block, of a shape that tensor cores take in 8 bits.

    What computes norms, times and embeddings is small, and loses most by rounding.
    """
    import torch

    return (
        isinstance(module, torch.nn.Linear)
        and "block" in name
        and re.search(r"norm|emb|time", name) is None
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )
