"""Batches made ready on a device: resized there as Pillow does it, and decoded there but for what is refused.

The CPU stands in the device's place, and its decoder in the place of the device's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.backends.extract.pictures import CentreCrop, Squeeze
from curation.backends.extract.scrfd import PictureSize, WhiteSquare
from curation.cluster import visible_gpus
from curation.errors import InfrastructureError
from curation.extract import device_jpeg
from curation.extract.feed import ExtractBatch, ExtractLoader
from curation.extract.staging import Stager
from curation.image_files import bare_jpeg, unlike_baseline
from curation.images import decode_rgb
from curation.tar.samples import read_samples
from tests import EXAMPLES
from tests.extract.test_feed import samples_of

torch = pytest.importorskip("torch")
SHARD = EXAMPLES / "00000004.tar"
PREPARATIONS = (CentreCrop(48), Squeeze(40), WhiteSquare(32), PictureSize())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos() -> list[Any]:
    found = [decode_rgb(s.members[str(s.image_suffix)]) for s in read_samples(SHARD) if s.image_suffix]
    assert len(found) == 20
    return found


def sizes() -> list[tuple[int, int]]:
    """60, among them extreme ones and those for which Pillow changes the order of its two passes."""
    rng = np.random.Generator(np.random.PCG64(60))
    extreme = [(1, 1), (1, 90), (90, 1), (48, 48), (49, 48), (48, 97), (2, 99), (300, 20), (20, 300), (60, 131)]
    return [*extreme, *((int(w), int(h)) for w, h in rng.integers(3, 280, (50, 2)))]


@pytest.mark.parametrize("preparation", [CentreCrop(48), Squeeze(40), WhiteSquare(32), PictureSize()])
def test_a_device_resizes_as_pillow_does(photos: list[Any], preparation: Any) -> None:
    """Within one level by the promise; here, where the weights are rounded alike, to the last bit."""
    shown = [
        np.asarray(Image.fromarray(photos[n % len(photos)]).resize(size, Image.Resampling.BOX))
        for n, size in enumerate(sizes())
    ]
    found = preparation.on_device([torch.from_numpy(np.array(pixels)) for pixels in shown]).numpy()
    expected = np.stack([preparation(pixels) for pixels in shown])
    assert len(shown) == 60 and found.shape == expected.shape and found.dtype == expected.dtype
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 1e-4


def test_many_pictures_are_resized_in_groups(photos: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.extract.resample._MOST_SUMS", 100_000)
    some = [pixels[::3, ::4].copy() for pixels in photos]
    found = CentreCrop(48).on_device([torch.from_numpy(pixels) for pixels in some]).numpy()
    assert np.array_equal(found, np.stack([CentreCrop(48)(pixels) for pixels in some]))


# ---- batches


class Refusing(device_jpeg._OnHost):
    """Refuses every second JPEG, or gives one of another size."""

    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        found = super().__call__(images)
        assert not any(b"Exif" in image for image in images)
        return [None if n % 3 == 1 else p[1:] if n % 3 == 2 and p is not None else p for n, p in enumerate(found)]


class Full(device_jpeg._OnHost):
    def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
        raise RuntimeError("CUDA out of memory")


@pytest.fixture(scope="module")
def loader() -> Iterator[ExtractLoader]:
    made = ExtractLoader(PREPARATIONS, 8, 1, least_slots=3, for_device=True)
    yield made
    made.close()


def staged(loader: ExtractLoader, decoder: Any) -> list[tuple[list[Any], list[Any], list[str | None]]]:
    """Of each batch: the arrays on the device, those in memory after all, and why pictures were left to the CPU."""
    stager = Stager(loader, "cpu", decoder)
    found = []
    with loader.batches(samples_of(SHARD), lambda _: False, stager.stage) as take:
        while (taken := take()) is not None:
            batch: ExtractBatch = taken[0]
            numbers = range(len(PREPARATIONS))
            tensors = [stager.tensor(batch, number) for number in numbers]
            for number in numbers:
                stager.bring_back(batch, number)
            arrays = [np.array(loader.array(batch, number)) for number in numbers]
            assert all(t is None or np.array_equal(t.numpy(), a) for t, a in zip(tensors, arrays, strict=True))
            reasons = [sample.outcome.off_device for sample in batch.samples]
            found.append((tensors, arrays, reasons))
            loader.release(batch)
            assert all(sample.image is None for sample in batch.samples)
    return found


@pytest.mark.parametrize("kind", [device_jpeg._OnHost, Refusing, Full])
def test_what_the_device_does_not_decode_the_processes_prepare(
    loader: ExtractLoader, photos: list[Any], kind: Any
) -> None:
    found = staged(loader, kind("cpu"))
    for number, preparation in enumerate(PREPARATIONS):
        given = np.concatenate([arrays[number] for _, arrays, _ in found])
        assert np.array_equal(given, np.stack([preparation(pixels) for pixels in photos])), preparation
    reasons = [reason for _, _, some in found for reason in some]
    jpegs = sum(s.image_suffix == "jpg" for s in read_samples(SHARD))
    assert 0 < jpegs < 20 and reasons.count("not_jpeg") == 20 - jpegs
    expected = {device_jpeg._OnHost: {None}, Refusing: {None, "decoder"}, Full: {"out_of_memory"}}[kind]
    assert set(reasons) - {"not_jpeg"} == expected


def test_a_shard_that_is_given_up_ends_the_staging_thread(loader: ExtractLoader) -> None:
    stager = Stager(loader, "cpu", device_jpeg._OnHost("cpu"))
    for _ in range(3):
        with loader.batches(samples_of(SHARD), lambda _: False, stager.stage) as take:
            take()
    assert len(staged(loader, device_jpeg._OnHost("cpu"))) == 3


def _killed(parent: int) -> int:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def test_an_errand_is_done_by_a_process_and_here_where_that_one_dies(loader: ExtractLoader) -> None:
    assert loader.beside(os.getpid).result() != os.getpid()
    assert loader.beside(_killed, os.getpid()).result() == 7
    assert loader.beside(os.getpid).result() != os.getpid(), "another process takes its place"


def test_without_a_decoder_only_what_is_asked_for_is_copied_ahead(photos: list[Any]) -> None:
    loader = ExtractLoader(PREPARATIONS, 8, 1, least_slots=3)
    stager = Stager(loader, "cpu", None)
    found = []
    with loader.batches(samples_of(SHARD), lambda _: False, stager.stage) as take:
        while (taken := take()) is not None:
            is_first = stager.tensor(taken[0], 1) is None
            assert is_first == (not found or 1 not in taken[0].staged.tensors)
            found.append((sorted(taken[0].staged.tensors), np.array(loader.array(taken[0], 1))))
            loader.release(taken[0])
    assert [numbers for numbers, _ in found[2:]] == [[1]], "the first two were staged before anybody asked"
    assert np.array_equal(np.concatenate([array for _, array in found]), [Squeeze(40)(pixels) for pixels in photos])
    loader.close()


# ---- decoders


def test_without_a_decoder_it_is_told_why_of_each() -> None:
    if visible_gpus():
        pytest.skip("this machine has GPUs")
    with pytest.raises(InfrastructureError) as caught:
        device_jpeg.open_decoder("cuda:0")
    told = str(caught.value)
    assert all(f"{name}: " in told for name in ("nvImageCodec", "TorchCodec", "torchvision"))
    assert "use --decode cpu" in told and "\n" not in told


def test_a_decoder_is_tried_before_it_is_trusted() -> None:
    class Wrong:
        name = "wrong"

        def __init__(self, change: Any) -> None:
            self._change = change

        def __call__(self, images: Sequence[bytes]) -> list[Any | None]:
            return [self._change(torch.from_numpy(decode_rgb(image))) for image in images]

    assert device_jpeg._tried(device_jpeg._OnHost("cpu")) == ""
    assert "does not decode" in device_jpeg._tried(Wrong(lambda _: None))
    assert "does not decode" in device_jpeg._tried(Wrong(lambda pixels: pixels.permute(2, 0, 1)))
    assert "levels apart" in device_jpeg._tried(Wrong(lambda pixels: pixels.flip(2)))


def test_a_batch_that_raises_is_decoded_one_by_one() -> None:
    def decode(images: Sequence[bytes]) -> Any:
        if b"bad" in images:
            raise RuntimeError("unsupported")
        return [torch.zeros(3, 4, len(image), dtype=torch.uint8) for image in images]

    shapes = [None if p is None else tuple(p.shape) for p in device_jpeg._one_by_one(decode, [b"12", b"bad", b"1"])]
    assert shapes == [(4, 2, 3), None, (4, 1, 3)]


def test_only_everyday_jpegs_are_for_a_device(photos: list[Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description that is no part of the pixels"
    image = Image.fromarray(photos[0])
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"hidden", icc_profile=b"profile" * 9)
    data = (tmp_path / "a.jpg").read_bytes()
    bare = bare_jpeg(data)
    assert unlike_baseline(data) is None and unlike_baseline(bare) is None
    assert not any(text in bare for text in (b"Exif", b"description", b"hidden", b"profile"))
    assert np.array_equal(decode_rgb(bare), decode_rgb(data))
    start = data.index(b"\xff\xc0")
    assert unlike_baseline(data[: start + 4] + b"\x0c" + data[start + 5 :]) == "12_bit"
    frame = data[start : start + 19]
    assert unlike_baseline(data[:start] + frame + data[start:]) == "unusual", "two frames, of two sizes perhaps"
    assert unlike_baseline(data[: start + 11] + b"\x44" + data[start + 12 :]) == "unusual"
    assert unlike_baseline(data.replace(b"\xff\xc0", b"\xff\xc3", 1)) == "unusual", "lossless"
    assert unlike_baseline(data[:start]) == unlike_baseline(b"\xff\xd8") == "cut"
