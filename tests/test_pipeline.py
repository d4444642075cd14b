"""The hybrid dataset of the main job, looked at from outside: with tarfile, webdataset and Pillow."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import EXAMPLES
from tests.pipeline import Undisturbed


def samples(path: Path) -> dict[str, dict[str, bytes]]:
    """key → suffix → bytes, by Python's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            content = archive.extractfile(member)
            assert content is not None
            found.setdefault(key, {})[suffix] = content.read()
    return found


def dictionary(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


SHARDS = sorted(path.stem for path in EXAMPLES.glob("*.tar"))


def test_every_stage_counts_on_from_the_stage_before(undisturbed: Undisturbed) -> None:
    root = undisturbed.root
    for shard in SHARDS:
        counts = {}
        for stage in undisturbed.stages:
            receipt = next((root / stage.outputs[0]).glob(f"_receipts/{stage.name}/*/{shard}.json"))
            counts[stage.name] = json.loads(receipt.read_bytes())
        assert all(receipt["status"] == "done" for receipt in counts.values())
        into = {name: receipt["counts"]["in"] for name, receipt in counts.items()}
        kept = {name: receipt["counts"]["kept"] for name, receipt in counts.items()}
        total = len(samples(EXAMPLES / f"{shard}.tar"))
        assert into["01_filter_noface"] == into["04_reshard"] == total
        assert kept["01_filter_noface"] == into["02_captions_processor"]
        assert kept["02_captions_processor"] == into["03_generate_images"]
        assert len(dictionary(root / "captions" / f"{shard}.json")) == kept["01_filter_noface"]
        assert len(dictionary(root / "prompts" / f"{shard}.json")) == kept["02_captions_processor"]


def test_something_was_replaced(undisturbed: Undisturbed) -> None:
    assert sum(len(dictionary(undisturbed.root / "prompts" / f"{shard}.json")) for shard in SHARDS) >= 6


@pytest.mark.parametrize("shard", SHARDS)
def test_untouched_samples_keep_every_byte_and_edited_ones_agree_with_themselves(
    shard: str, undisturbed: Undisturbed
) -> None:
    root = undisturbed.root
    before, after = samples(EXAMPLES / f"{shard}.tar"), samples(root / "hybrid" / f"{shard}.tar")
    prompts = dictionary(root / "prompts" / f"{shard}.json")
    assert list(after) == list(before), "every key once, in the source's order"
    for key, members in after.items():
        prompt = prompts.get(f"{key}.json")
        if prompt is None:
            assert members == before[key]
            continue
        assert members.keys() == before[key].keys(), "the new image has the name of the one whose place it takes"
        (suffix,) = members.keys() - {"txt", "json"}
        metadata, original = json.loads(members["json"]), json.loads(before[key]["json"])
        assert members["txt"].decode() == prompt == metadata["caption"]
        assert metadata["sha256"] == hashlib.sha256(members[suffix]).hexdigest()
        image = Image.open(io.BytesIO(members[suffix]))
        image.load()
        assert (metadata["width"], metadata["height"]) == image.size
        assert b"trainedAlgorithmicMedia" in members[suffix]
        assert metadata["uid"] == original["uid"] and metadata["url"] == original["url"]
        assert metadata["curation"]["original_caption"] == original["caption"]
        assert metadata["curation"]["original_sha256"] == original["sha256"]


def test_webdataset_gives_every_sample_once(undisturbed: Undisturbed) -> None:
    import webdataset

    urls = [str(undisturbed.root / "hybrid" / f"{shard}.tar") for shard in SHARDS]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil")
    keys = [(sample["__url__"], sample["__key__"]) for sample in dataset]
    expected = [(url, key) for url, s in zip(urls, SHARDS, strict=True) for key in samples(EXAMPLES / f"{s}.tar")]
    assert keys == expected


def test_the_group_of_every_prompt_is_recorded(undisturbed: Undisturbed) -> None:
    for shard in SHARDS:
        prompts = dictionary(undisturbed.root / "prompts" / f"{shard}.json")
        if not prompts:
            continue
        lines = (undisturbed.root / f"prompts/_provenance/02_captions_processor/{shard}.jsonl").read_text().splitlines()
        recorded = {line["key"]: line for line in map(json.loads, lines)}
        assert {key.removesuffix(".json") for key in prompts} <= set(recorded)
        assert all(line["group"] for line in recorded.values())
