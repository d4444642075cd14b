"""JPEGs decoded on a GPU, by whichever library is installed and works there: nvImageCodec, TorchCodec or torchvision.

All three are NVIDIA's nvJPEG below (torchvision's build for AMD: rocJPEG).  nvImageCodec tells which pictures of a
batch it could not decode, and interpolates colours as the CPU's decoder does; the other two raise for a whole batch,
which is then decoded one by one.  TorchCodec takes the place of torchvision's decoders, which are deprecated.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol

from curation.errors import InfrastructureError, SampleError
from curation.images import decode_rgb, encode_jpeg
from curation.libraries import np

logger = logging.getLogger("curation")

MOST_LEVELS_APART = 16  # of a smooth picture in the trial, from what the CPU decodes

# What a library raises about one picture, or about all of them.
_REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, OSError)


class DeviceDecoder(Protocol):
    """name: with its version."""

    name: str

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        """A tensor on the device of height × width × 3, uint8, for each JPEG; None for one that is refused."""


class _NvImageCodec:
    """A decoder of one device; it decodes on the stream that is torch's current one."""

    def __init__(self, device: str) -> None:
        import torch
        from nvidia import nvimgcodec as codec

        self.name = f"nvImageCodec {codec.__version__}"
        self._torch, self._codec, self._device = torch, codec, device
        kinds = codec.BackendKind
        backends = [codec.Backend(kind) for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)]
        number = int(device.partition(":")[2] or 0)
        self._decoder = codec.Decoder(device_id=number, backends=backends, options=":fancy_upsampling=1")
        self._settings = codec.DecodeParams(apply_exif_orientation=False)

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        streams = [self._codec.CodeStream(image) for image in images]
        number = self._torch.cuda.current_stream(self._device).cuda_stream
        found = self._decoder.decode(streams, params=self._settings, cuda_stream=number)
        return [None if image is None else self._torch.from_dlpack(image) for image in found]


class _TorchCodec:
    def __init__(self, device: str) -> None:
        from torchcodec.decoders import decode_jpeg  # from 0.16 on

        self.name = f"TorchCodec {metadata.version('torchcodec')}"
        self._decode: Callable[..., Any] = decode_jpeg
        self._device = device

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        return _one_by_one(lambda some: self._decode(some, mode="RGB", device=self._device), images)


class _TorchVision:
    def __init__(self, device: str) -> None:
        import torch
        from torchvision import io

        self._torch, self._io = torch, io
        self.name = f"torchvision {metadata.version('torchvision')}"
        self._device = device

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        return _one_by_one(self._decode, images)

    def _decode(self, images: Sequence[bytes]) -> Any:
        given = [self._torch.frombuffer(bytearray(image), dtype=self._torch.uint8) for image in images]
        return self._io.decode_jpeg(given, mode="RGB", device=self._device)


class _OnHost:
    """The CPU's decoder in a device's place, with ``--device cpu``: the rest of the way can be tried without a GPU."""

    name = "the CPU's decoder, for a trial without a GPU"

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        return list(map(self._decode, images))

    def _decode(self, image: bytes) -> Any | None:
        try:
            return self._torch.from_numpy(decode_rgb(image, on_white=False))
        except SampleError:
            return None


# In the order of preference.
_DECODERS: tuple[tuple[str, Callable[[str], DeviceDecoder]], ...] = (
    ("nvImageCodec", _NvImageCodec),
    ("TorchCodec", _TorchCodec),
    ("torchvision", _TorchVision),
)


def open_decoder(device: str) -> DeviceDecoder:
    """The first decoder that is installed and decodes a trial picture on this device; one line of the log names it.

    Raises:
        InfrastructureError: None does; it says why for each.
    """
    if device == "cpu":
        found: DeviceDecoder = _OnHost(device)
    else:
        found = _first_that_works(device)
    logger.info(f"--decode gpu: JPEGs are decoded on {device} by {found.name}")
    return found


def _first_that_works(device: str) -> DeviceDecoder:
    reasons = []
    for name, kind in _DECODERS:
        try:
            found = kind(device)
            problem = _tried(found)
        except (ImportError, AttributeError, metadata.PackageNotFoundError, *_REFUSALS) as error:
            problem = (str(error).strip() or type(error).__name__).partition("\n")[0][:160]
        if not problem:
            return found
        reasons.append(f"{name}: {problem}")
    raise InfrastructureError(
        f"--decode gpu: no decoder of JPEGs works on {device} ({'; '.join(reasons)}).  Install one, such as "
        "nvidia-nvimgcodec-cu13 with nvidia-nvjpeg (-cu12 for CUDA 12), or use --decode cpu"
    )


def _tried(decoder: DeviceDecoder) -> str:
    """What is wrong with it, "" for nothing: it has to show a smooth picture as the CPU does."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture = np.stack([rows * 2, columns, 255 - rows], axis=2).astype(np.uint8)
    image = encode_jpeg(picture, 95)
    (found,) = decoder([image])
    if found is None or tuple(found.shape) != picture.shape:
        return f"it does not decode a JPEG ({None if found is None else tuple(found.shape)})"
    apart = np.abs(found.cpu().numpy().astype(int) - decode_rgb(image)).max()
    return "" if apart <= MOST_LEVELS_APART else f"it shows a picture {apart} levels apart from the CPU's"


def _one_by_one(decode: Callable[[Sequence[bytes]], Any], images: Sequence[bytes]) -> list[Any | None]:
    """A batch by a function that gives 3 × height × width for each or raises for all of them."""
    with contextlib.suppress(*_REFUSALS):
        return [picture.permute(1, 2, 0) for picture in decode(images)]
    found: list[Any | None] = []
    for image in images:
        try:
            found.append(decode([image])[0].permute(1, 2, 0))
        except _REFUSALS:
            found.append(None)
    return found
