"""Hybrid shards in the libraries that users load them with: every sample exactly once, in each of them.

Outputs of the whole pipeline over the example shards: shard by shard, regrouped with shuffling and copies, and over
sources whose pictures are webp and png.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.images import encode_as
from curation.reshard.uids import UID, uid_of
from curation.tar.samples import TarWriter, read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from tests.pipeline import Undisturbed

wds = pytest.importorskip("webdataset")
torch = pytest.importorskip("torch")
stage_04 = importlib.import_module("04_reshard")


@dataclass
class Output:
    folder: Path
    samples: dict[str, dict[str, bytes]]  # key → suffix → bytes
    is_uniform: bool  # all pictures have one suffix

    @property
    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]

    def check(self, keys: Iterable[str]) -> None:
        assert Counter(keys) == Counter(list(self.samples))


def shards_as(kind: str, source: Path, target: Path) -> Path:
    """Copies of shards whose pictures have another format."""
    target.mkdir()
    for path in sorted(source.glob("*.tar")):
        with open(target / path.name, "wb") as file:
            writer = TarWriter(file)
            for sample in read_samples(path):
                for suffix, data in sample.members.items():
                    is_image = suffix in IMAGE_SUFFIXES
                    new = encode_as(kind, data, 90) if is_image else bytes(data)
                    writer.add(f"{sample.key}.{kind if is_image else suffix}", new)
            writer.close()
    return target


@pytest.fixture(scope="module", params=["shard by shard", "regrouped", "over jpg", "over webp", "over png"])
def output(
    request: pytest.FixtureRequest, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Output:
    root, folder = undisturbed.root, tmp_path_factory.mktemp("hybrid") / "shards"
    kind = request.param.removeprefix("over ")
    source = root / "shards"
    if kind in ("jpg", "webp", "png"):
        source = shards_as(kind, source, folder.parent / "source")
    argv = ["--input", str(source), "--edits", f"{root}/edits", "--prompts", f"{root}/prompts"]
    argv += ["--output", str(folder), "--index", "--quiet"]
    if request.param == "regrouped":
        found = [s for path in sorted((root / "shards").glob("*.tar")) for s in read_samples(path, {"json"})]
        uids = [uid_of(json.loads(sample.members["json"])) for sample in found]
        np.save(folder.parent / "keep.npy", np.sort(np.array(uids + uids[::9], UID)))
        argv += ["--subset", f"{folder.parent}/keep.npy", "--shard_size", "16", "--shuffle_buffer", "40"]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(stage_04.main, argv).result() == 0
    samples = {s.key: s.members for path in sorted(folder.glob("*.tar")) for s in read_samples(path)}
    assert len(samples) == (85 if request.param == "regrouped" else 76)
    names = {name for members in samples.values() for name in members}
    assert names == {*((kind,) if source != root / "shards" else ("jpg", "webp")), "txt", "json"}
    return Output(folder, samples, len(names) == 3)


def image_of(sample: dict[str, Any]) -> Any:
    return next(value for name, value in sample.items() if name in IMAGE_SUFFIXES)


def decoded(data: bytes) -> Any:
    """The pixels as Pillow decodes them."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_webdataset(output: Output) -> None:
    keys = []
    for sample in wds.WebDataset(output.tars, shardshuffle=False):
        keys.append(sample["__key__"])
        expected = output.samples[sample["__key__"]]
        assert {name: sample[name] for name in expected} == expected
    output.check(keys)
    pictures = list(wds.WebDataset(output.tars, shardshuffle=False).decode("rgb8"))
    output.check(sample["__key__"] for sample in pictures)
    for sample in pictures:
        assert np.array_equal(image_of(sample), decoded(image_of(output.samples[sample["__key__"]])))
    assert all(isinstance(sample["json"]["uid"], str) for sample in pictures)


def test_a_torch_loader_with_two_workers(output: Output) -> None:
    dataset = wds.WebDataset(output.tars, shardshuffle=False, workersplitter=wds.split_by_worker).map(key_and_text)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    found = list(loader)
    output.check(key for key, _ in found)
    assert dict(found) == {key: members["txt"].decode() for key, members in output.samples.items()}


def key_and_text(sample: dict[str, Any]) -> tuple[str, str]:
    return sample["__key__"], sample["txt"].decode()


def test_open_clips_conventions(output: Output) -> None:
    """Its pipeline: members grouped by key without raising, samples without image or caption left out, images decoded,
    renamed and batched."""

    def grouped(shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """A sample ends where the key changes, or where a suffix comes again."""
        sample: dict[str, Any] = {}
        streams = wds.tariterators.url_opener(shards)
        for member in wds.tariterators.tar_file_expander(streams, eof_value=None):
            key, suffix = wds.tariterators.base_plus_ext(member["fname"])
            if key is None:
                continue
            if sample and (key != sample["__key__"] or suffix.lower() in sample):
                yield sample
                sample = {}
            sample |= {"__key__": key, "__url__": member["__url__"], suffix.lower(): member["data"]}
        if sample:
            yield sample

    def has_image_and_caption(sample: dict[str, Any]) -> bool:
        return "txt" in sample and bool({"png", "jpg", "jpeg", "webp"} & sample.keys())

    pipeline = wds.DataPipeline(
        wds.SimpleShardList(output.tars),
        grouped,
        wds.select(has_image_and_caption),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt", key="__key__"),
        wds.map_dict(image=lambda image: np.asarray(image.resize((224, 224))), text=str.strip),
        wds.to_tuple("image", "text", "key"),
        wds.batched(32, partial=True),
    )
    keys: list[str] = []
    for images, texts, batch in pipeline:
        assert images.shape == (len(batch), 224, 224, 3)
        assert list(texts) == [output.samples[key]["txt"].decode().strip() for key in batch]
        keys += batch
    output.check(keys)


def test_hugging_face_datasets(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    streamed = datasets.load_dataset(
        "webdataset", data_files={"train": output.tars}, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    keys = []
    for sample in streamed:
        keys.append(sample["__key__"])
        assert sample["txt"] == output.samples[sample["__key__"]]["txt"].decode()
        assert sample["json"]["uid"] == json.loads(output.samples[sample["__key__"]]["json"])["uid"]
        picture = image_of(sample)
        if picture is None:  # the one webp among the example shards: this reader has no column for it
            assert "webp" in output.samples[sample["__key__"]]
            assert not output.is_uniform
            continue
        assert np.array_equal(picture.convert("RGB"), decoded(image_of(output.samples[sample["__key__"]])))
    output.check(keys)
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": output.tars}, split="train", cache_dir=str(tmp_path / "cache")
    )
    output.check(loaded["__key__"])


def test_wids(output: Output, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids")
    index = json.loads((output.folder / "wids.json").read_bytes())
    assert [shard["url"] for shard in index["shardlist"]] == [os.path.basename(tar) for tar in output.tars]
    assert [shard["filesize"] for shard in index["shardlist"]] == [os.path.getsize(tar) for tar in output.tars]
    dataset = wids.ShardListDataset(str(output.folder / "wids.json"), cache_dir=str(tmp_path), transformations=[])
    assert len(dataset) == len(output.samples)
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    keys = []
    for number in order:
        sample = dataset[number]
        keys.append(sample["__key__"])
        members = output.samples[sample["__key__"]]
        assert {name: sample[f".{name}"].read() for name in members} == members
    output.check(keys)
