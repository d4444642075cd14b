"""Small shards for tests: making them, and reading them with Python's tarfile, not with what is tested."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.images import encode_as
from curation.tar.headers import padded
from curation.tar.samples import TarWriter
from curation.tar.scan import IMAGE_SUFFIXES

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", mtime: int = 1_700_000_000, **fields: Any) -> Member:
    """A member as somebody's tar would write it; the fields are those of ``TarInfo``."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uid, info.uname, info.mode = len(data), mtime, 1000, "somebody", 0o640
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(members: Iterable[tuple[tarfile.TarInfo | str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar by Python's tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for named, data in members:
            info = member(named, data)[0] if isinstance(named, str) else named
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A shard as the stages write it: key → suffix → content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key, parts in samples.items():
            for suffix, data in parts.items():
                writer.add(f"{key}.{suffix}", data)
        writer.close()
    return path


def contents(tar: bytes | Path) -> dict[str, bytes]:
    """Name → content of the regular files, in order."""
    with tarfile.open(fileobj=io.BytesIO(tar if isinstance(tar, bytes) else tar.read_bytes())) as file:
        return {info.name: file.extractfile(info).read() for info in file if info.isreg()}  # type: ignore[union-attr]


def samples_of(tar: bytes | Path) -> dict[str, dict[str, bytes]]:
    """Key → suffix → content, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for name, data in contents(tar).items():
        key, _, suffix = name.partition(".")
        found.setdefault(key, {})[suffix] = data
    return found


def raw_members(tar: bytes) -> list[tuple[str, bytes]]:
    """Each member with all of its bytes: extended headers, header, data and padding."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        infos = list(file)
    ends = [info.offset for info in infos[1:]]
    ends += [info.offset_data + (padded(info.size) if info.isreg() else 0) for info in infos[-1:]]
    return [(info.name, tar[info.offset : end]) for info, end in zip(infos, ends, strict=True)]


def image_bytes(pixels: np.ndarray, format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def plain(colour: tuple[int, int, int], side: int = 32, format: str = "png") -> bytes:
    """A square image of one colour."""
    return image_bytes(np.full((side, side, 3), colour, np.uint8), format)


def noise(number: int, size: tuple[int, int] = (48, 32)) -> bytes:
    """An image of noise, another one for each number."""
    return image_bytes(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8))


def all_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Those of all tars of a folder; no key comes twice."""
    found = [samples_of(path) for path in sorted(folder.glob("*.tar"))]
    samples = {key: members for shard in found for key, members in shard.items()}
    assert len(samples) == sum(map(len, found))
    return samples


def shards_as(kind: str, source: Path, target: Path) -> Path:
    """Copies of shards whose pictures all have one format; those that have it already stay byte for byte."""
    for path in sorted(source.glob("*.tar")):
        samples = samples_of(path)
        for key, members in samples.items():
            samples[key] = {
                (kind if suffix in IMAGE_SUFFIXES else suffix): (
                    encode_as(kind, data, 90) if suffix in IMAGE_SUFFIXES and suffix != kind else data
                )
                for suffix, data in members.items()
            }
        write_shard(target / path.name, samples)
    return target


def image_of(sample: Mapping[str, Any]) -> Any:
    """The first picture of a sample, whatever a reader made of it."""
    return next(value for name, value in sample.items() if name in IMAGE_SUFFIXES)


def decoded(data: bytes) -> Any:
    """The pixels as Pillow decodes them."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
