"""Hybrid shards in the libraries that users load them with: every sample exactly once, in each of them.

Two outputs of the whole pipeline over the example shards: shard by shard, and regrouped with shuffling and copies.
"""

from __future__ import annotations

import importlib
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

from curation.reshard.uids import UID, uid_of
from curation.tar.samples import read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from tests.pipeline import Undisturbed

wds = pytest.importorskip("webdataset")
torch = pytest.importorskip("torch")
stage_04 = importlib.import_module("04_reshard")


@dataclass
class Output:
    folder: Path
    samples: dict[str, dict[str, bytes]]  # key → suffix → bytes

    @property
    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.folder.glob("*.tar"))]

    def check(self, keys: Iterable[str]) -> None:
        assert Counter(keys) == Counter(list(self.samples))


@pytest.fixture(scope="module", params=["shard by shard", "regrouped"])
def output(
    request: pytest.FixtureRequest, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Output:
    root, folder = undisturbed.root, tmp_path_factory.mktemp("hybrid") / "shards"
    argv = ["--input", f"{root}/shards", "--edits", f"{root}/edits", "--prompts", f"{root}/prompts"]
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
    return Output(folder, samples)


def image_of(sample: dict[str, Any]) -> Any:
    return next(value for name, value in sample.items() if name in IMAGE_SUFFIXES)


def test_webdataset(output: Output) -> None:
    keys = []
    for sample in wds.WebDataset(output.tars, shardshuffle=False):
        keys.append(sample["__key__"])
        expected = output.samples[sample["__key__"]]
        assert {name: sample[name] for name in expected} == expected
    output.check(keys)
    decoded = list(wds.WebDataset(output.tars, shardshuffle=False).decode("rgb8"))
    output.check(sample["__key__"] for sample in decoded)
    assert all(image_of(sample).ndim == 3 for sample in decoded)
    assert all(isinstance(sample["json"]["uid"], str) for sample in decoded)


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
        assert sample[".txt"].read() == output.samples[sample["__key__"]]["txt"]
    output.check(keys)
