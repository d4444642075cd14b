"""Hybrid shards in the libraries that users load them with: every sample exactly once, with every picture, in each.

Outputs of the whole pipeline over the example shards: shard by shard, a subset with copies that is regrouped and
shuffled, with blurred faces, and over sources whose pictures are webp and png.  What each library should find is read
by Python's tarfile, not by the project's own reader.
"""

from __future__ import annotations

import hashlib
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
import torch
import webdataset as wds
import wids
from PIL import Image

from curation.tar.scan import IMAGE_SUFFIXES
from tests.pipeline import Undisturbed
from tests.shards import all_samples, decoded, image_of, samples_of, shards_as

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


def write_subset(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """All uids, and each ninth twice, as docs/stage-04.md says how to."""
    uids = [json.loads(members["json"])["uid"] for members in samples.values()]
    pairs = np.array([divmod(int(uid, 16), 2**64) for uid in uids + uids[::9]], "u8,u8")
    np.save(path, np.sort(pairs))


def write_rows(folder: Path, source: Path) -> None:
    """A synthetic caption for all samples but each seventh, of the pictures of the source."""
    folder.mkdir(parents=True)
    for path in sorted(source.glob("*.tar")):
        lines = []
        for number, (key, members) in enumerate(samples_of(path).items()):
            row = {"key": key, "caption": f"seen {key}", "image_sha256": hashlib.sha256(image_of(members)).hexdigest()}
            lines += [json.dumps(row) + "\n"] if number % 7 else []
        (folder / f"{path.stem}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module", params=["shard by shard", "regrouped jpg", "blurred jpg", "mixed jpg", "webp", "png"])
def output(
    request: pytest.FixtureRequest, undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory
) -> Output:
    root, folder = undisturbed.root, tmp_path_factory.mktemp("hybrid") / "shards"
    how, _, kind = request.param.rpartition(" ")
    source = root / "shards"
    if kind in ("jpg", "webp", "png"):
        source = shards_as(kind, source, folder.parent / "source")
    before = all_samples(source)
    argv = ["--input", str(source), "--edits", f"{root}/edits", "--prompts", f"{root}/prompts"]
    argv += ["--output", str(folder), "--index", "--quiet"]
    if how == "regrouped":
        write_subset(folder.parent / "keep.npy", before)
        argv += ["--subset", f"{folder.parent}/keep.npy", "--shard_size", "16", "--shuffle_buffer", "40"]
    if how == "blurred":
        argv += ["--blur_faces", "recorded"]
    if how == "mixed":
        write_rows(folder.parent / "recaptions/rows", source)
        argv += ["--captions", str(folder.parent / "recaptions"), "--mix", "0.4:web,0.6:synthetic"]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(stage_04.main, argv).result() == 0
    samples = all_samples(folder)
    assert len(samples) == (85 if how == "regrouped" else 76)
    names = {name for members in samples.values() for name in members}
    assert names == {*((kind,) if source != root / "shards" else ("jpg", "webp")), "txt", "json"}
    if how == "mixed":
        check_captions(samples, before, all_samples(root / "edits"))
    else:
        check_content(samples, before, all_samples(root / "edits"), how)
    return Output(folder, samples, len(names) == 3)


def check_content(
    samples: dict[str, dict[str, bytes]],
    before: dict[str, dict[str, bytes]],
    edits: dict[str, dict[str, bytes]],
    how: str,
) -> None:
    """Each sample is the source's, or the edit with its caption; a copy is the same under another key."""
    edited = blurred = 0
    for name, members in samples.items():
        key = name if name in before else name.rpartition("-")[0]
        old, new = before[key], edits.get(key)
        assert members["txt"] == (new or old)["txt"]
        if new is not None:
            edited += 1
            ((suffix, picture),) = ((s, data) for s, data in members.items() if s in IMAGE_SUFFIXES)
            near = np.abs(decoded(picture).astype(int) - decoded(new["jpg"])).mean()
            assert picture == new["jpg"] if suffix == "jpg" else near < (8 if suffix == "webp" else 1e-9)
            assert json.loads(members["json"])["caption"] == json.loads(new["json"])["caption"]
        elif members != old:
            blurred += 1
            assert how == "blurred" and json.loads(old["json"])["face_bboxes"]
            assert members.keys() == old.keys()
            assert decoded(image_of(members)).shape == decoded(image_of(old)).shape
    assert edited >= len(edits) > 0 and (blurred > 0) == (how == "blurred")


def check_captions(
    samples: dict[str, dict[str, bytes]], before: dict[str, dict[str, bytes]], edits: dict[str, dict[str, bytes]]
) -> None:
    """Each sample has the caption that its json names; all jsons have the same names; pictures are as without a mix."""
    kinds = Counter[str]()
    for key, members in samples.items():
        told = json.loads(members["json"])
        kinds[told["caption_source"]] += 1
        assert told["caption"] == members["txt"].decode() == told["caption_choices"][told["caption_source"]]
        assert list(told["caption_choices"]) == ["web", "prompt", "synthetic"]
        assert told["caption_choices"]["synthetic"] in ("", f"seen {key}")
        assert image_of(members) == (edits[key]["jpg"] if key in edits else image_of(before[key]))
        assert (told["caption_source"] == "prompt") == (key in edits)
    assert kinds["prompt"] == len(edits) and min(kinds.values()) > 2, kinds


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
    dataset = wds.WebDataset(output.tars, shardshuffle=False, workersplitter=wds.split_by_worker).decode("rgb8")
    loader = torch.utils.data.DataLoader(dataset.map(picture_and_text), batch_size=None, num_workers=2)
    keys = []
    for key, picture, text in loader:
        keys.append(key)
        expected = output.samples[key]
        assert np.array_equal(picture, decoded(image_of(expected)))
        assert text == expected["txt"].decode()
    output.check(keys)


def picture_and_text(sample: dict[str, Any]) -> tuple[str, Any, str]:
    return sample["__key__"], image_of(sample), sample["txt"]


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
        wds.map_dict(image=as_a_model_sees_it, text=str.strip),
        wds.to_tuple("image", "text", "key"),
        wds.batched(32, partial=True),
    )
    keys: list[str] = []
    for images, texts, batch in pipeline:
        for image, key in zip(images, batch, strict=True):
            picture = Image.open(io.BytesIO(image_of(output.samples[key]))).convert("RGB")
            assert np.array_equal(image, as_a_model_sees_it(picture))
        assert list(texts) == [output.samples[key]["txt"].decode().strip() for key in batch]
        keys += batch
    output.check(keys)


def as_a_model_sees_it(image: Image.Image) -> Any:
    return np.asarray(image.resize((224, 224)))


def test_hugging_face_datasets(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    streamed = datasets.load_dataset(
        "webdataset", data_files={"train": output.tars}, split="train", streaming=True, cache_dir=str(tmp_path)
    )
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": output.tars}, split="train", cache_dir=str(tmp_path / "cache")
    )
    for way in (streamed, loaded):
        keys = []
        for sample in way:
            keys.append(sample["__key__"])
            members = output.samples[sample["__key__"]]
            told = json.loads(members["json"])
            assert sample["txt"] == members["txt"].decode()
            assert {name: sample["json"][name] for name in ("uid", "caption", "sha256")} == {
                name: told[name] for name in ("uid", "caption", "sha256")
            }
            picture = image_of(sample)
            if picture is None:  # the one webp among the example shards: this reader has no column for it
                assert "webp" in members
                assert not output.is_uniform
                continue
            assert np.array_equal(picture.convert("RGB"), decoded(image_of(members)))
        output.check(keys)


def test_the_sizes_that_open_clip_reads(output: Output) -> None:
    """By the rule of its ``get_dataset_size``: the file is beside the first shard, and has each shard's file name."""
    sizes = json.loads((Path(output.tars[0]).parent / "sizes.json").read_bytes())
    assert sum(int(sizes[os.path.basename(tar)]) for tar in output.tars) == len(output.samples)
    for tar in output.tars:
        assert sizes[os.path.basename(tar)] == sum(1 for _ in wds.WebDataset([tar], shardshuffle=False))


def test_wids(output: Output, tmp_path: Path) -> None:
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
