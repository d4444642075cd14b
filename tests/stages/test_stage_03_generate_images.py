"""Stage 03 through its real script, runner and diffusers, with the embedded pipeline at 64×64."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation.backends.generate.diffusers import Backend
from curation.backends.generate.presets import Preset, preset_for
from curation.backends.generate.tiny import save_tiny_sd
from curation.cluster import visible_gpus
from curation.edits import GENERATED_XMP
from curation.errors import UsageError
from tests import EXAMPLES, ROOT, replaced
from tests.backends.test_generate import copy_pipeline, limit_memory, spoil
from tests.shards import contents
from tests.stages.harness import Records

pytest.importorskip("torch")
stage = importlib.import_module("03_generate_images_multigpu")

SHARD = "00000003"
NAME = "03_generate_images"
SMALL = ["--embedded", "--height", "64", "--width", "64", "--batch_size", "4", "--quiet", "--lease_s", "2"]


pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_input(tmp_path / "data")


def make_input(root: Path, count: int = 10, shard: str = SHARD) -> Path:
    """Prompts and metadata as stages 02 and 01 leave them, in shards that were made elsewhere."""
    for folder in ("prompts", "edits"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = [f"{hashlib.md5(f'{shard}{i}'.encode()).hexdigest()}-0" for i in range(count)]
    metadata = {f"{key}.json": original(key, i) for i, key in enumerate(keys)}
    write(root / f"edits/{shard}.json", metadata)
    write(root / f"prompts/{shard}.json", {name: f"A photo of person {i}" for i, name in enumerate(metadata)})
    return root


def original(key: str, number: int) -> dict[str, Any]:
    return {
        "uid": key.removesuffix("-0"),
        "face_bboxes": [[0.1, 0.1, 0.5, 0.5]],
        "caption": f"the old caption {number}",
        "url": f"https://example.org/{number}.jpg",
        "key": f"{number:012d}",
        "status": "success",
        "error_message": None,
        "width": 640 if number % 3 else 400,
        "height": 480 if number % 3 else 600,
        "original_width": 1280,
        "exif": '{"Model": "X"}',
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "extra": {"kept": [number, "ü", None]},
    }


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def run(root: Path, *flags: str, small: list[str] = SMALL) -> int:
    return int(stage.main(["--input", f"{root}/prompts", "--output", f"{root}/edits", *replaced(small, flags)]))


def read_tar(root: Path, shard: str = SHARD) -> dict[str, bytes]:
    return contents(root / f"edits/{shard}.tar")


def metadata_of(root: Path, shard: str = SHARD) -> dict[str, dict[str, Any]]:
    return {name[:-5]: json.loads(data) for name, data in read_tar(root, shard).items() if name.endswith(".json")}


def receipt(root: Path, shard: str = SHARD) -> dict[str, Any]:
    return Records(NAME).receipt(root / "edits", shard)


def rejects(root: Path) -> dict[str, str]:
    return Records(NAME).rejects(root / "edits", SHARD)


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> list[str]:
    """Edit a dictionary in place; returns its keys as they were."""
    value = json.loads(path.read_bytes())
    keys = [name.removesuffix(".json") for name in value]
    edit(value)
    write(path, value)
    return keys


@contextlib.contextmanager
def on_batch(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None] = lambda number: None) -> Iterator[list[int]]:
    """The sizes of the batches that the backend is asked for; ``act`` is called with each one's number, from 1."""
    sizes: list[int] = []
    real = Backend.generate

    def generate(self: Backend, requests: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(requests))
        act(len(sizes))
        return real(self, requests, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "generate", generate)
        yield sizes


# ---- what comes out


def test_an_edited_sample_is_jpg_txt_and_json_that_agree(root: Path) -> None:
    assert run(root) == 0
    members = read_tar(root)
    prompts = json.loads((root / f"prompts/{SHARD}.json").read_bytes())
    before = json.loads((root / f"edits/{SHARD}.json").read_bytes())
    keys = [name.removesuffix(".json") for name in prompts]
    assert list(members) == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt", "json")]
    for name, prompt in prompts.items():
        key = name.removesuffix(".json")
        jpg, metadata = members[f"{key}.jpg"], json.loads(members[name])
        assert members[f"{key}.txt"].decode() == prompt == metadata["caption"]
        with Image.open(io.BytesIO(jpg)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
            assert image.info["xmp"] == GENERATED_XMP
        assert metadata["sha256"] == hashlib.sha256(jpg).hexdigest()
        assert list(metadata) == [*before[name], "curation"], "every field stays, in its order"
        replaced = {"caption": prompt, "sha256": metadata["sha256"], "width": 64, "height": 64, "face_bboxes": None}
        assert metadata == {**before[name], **replaced, "curation": metadata["curation"]}
    assert receipt(root)["counts"] == {"in": 10, "kept": 10, "dropped": {}, "failed": {}}
    assert receipt(root)["notes"]["threads"] == 1


def test_the_xmp_says_where_the_picture_comes_from() -> None:
    import xml.etree.ElementTree as xml

    tag = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    told = [element.get(tag) for element in xml.fromstring(GENERATED_XMP).iter() if element.get(tag)]
    assert told == ["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"]


def test_the_curation_object_tells_the_story_without_times_and_places(root: Path) -> None:
    provenance = root / "prompts/_provenance/02_captions_processor"
    provenance.mkdir(parents=True)
    prompts = json.loads((root / f"prompts/{SHARD}.json").read_bytes())
    group = {"ethnicity": "asian", "gender": "female"}
    lines = [{"key": name.removesuffix(".json"), "group": group, "model": "tulu3:fairclip"} for name in prompts]
    (provenance / f"{SHARD}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder, name, version in (("prompts", "02_captions_processor", 3), ("edits", "01_filter_noface", 2)):
        receipts = root / folder / "_receipts" / name / "00000"
        receipts.mkdir(parents=True)
        source = root / folder / f"{SHARD}.json"
        from curation.storage.files import fast_digest

        output = {"path": f"{SHARD}.json", "size": source.stat().st_size, "digest": fast_digest(source)}
        write(receipts / f"{SHARD}.json", {"status": "done", "version": version, "outputs": [output]})
    assert run(root, "--seed", "5", "--prompt_suffix", ", sharp") == 0
    for key, metadata in metadata_of(root).items():
        number = int(metadata["key"])
        assert metadata["curation"] == {
            "original_caption": f"the old caption {number}",
            "original_sha256": hashlib.sha256(key.encode()).hexdigest(),
            "original_face_bboxes": [[0.1, 0.1, 0.5, 0.5]],
            "original_width": 640 if number % 3 else 400,
            "original_height": 480 if number % 3 else 600,
            "prompt": f"A photo of person {number}",
            "prompt_suffix": ", sharp",
            "negative_prompt": "",
            "group": group,
            "models": {
                "prompt": "tulu3:fairclip",
                "image": {"name": "embedded/tiny-sd", "revision": "1", "dtype": "float32"},
            },
            "seed": 5,
            "steps": 1,
            "guidance": 0.0,
            "text_tokens": None,
            "size": [64, 64],
            "quality": 90,
            "stages": {"01_filter_noface": 2, "02_captions_processor": 3, NAME: 1},
        }


def test_face_boxes_that_were_not_there_are_not_invented(root: Path) -> None:
    def edit(metadata: dict[str, Any]) -> None:
        for number, value in enumerate(metadata.values()):
            if number == 0:
                del value["face_bboxes"]
            elif number == 1:
                value["face_bboxes"] = None
            elif number == 2:
                value["curation"] = {"note": "of an earlier pass"}

    keys = change(root / f"edits/{SHARD}.json", edit)
    assert run(root) == 0
    after = metadata_of(root)
    assert "face_bboxes" not in after[keys[0]] and "original_face_bboxes" not in after[keys[0]]["curation"]
    assert after[keys[1]]["face_bboxes"] is None and after[keys[1]]["curation"]["original_face_bboxes"] is None
    assert after[keys[2]]["curation"]["previous"] == {"note": "of an earlier pass"}


def test_the_suffix_is_for_the_model_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real = Backend.generate

    def generate(self: Backend, requests: Any, *args: Any, **kwargs: Any) -> Any:
        told.extend(request.prompt for request in requests)
        return real(self, requests, *args, **kwargs)

    monkeypatch.setattr(Backend, "generate", generate)
    assert run(root, "--prompt_suffix", ", high quality") == 0
    assert told == [f"A photo of person {number}, high quality" for number in range(10)]
    assert {data.decode() for name, data in read_tar(root).items() if name.endswith(".txt")} == {
        f"A photo of person {number}" for number in range(10)
    }


def test_what_the_model_did_not_read_is_recorded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({next(iter(prompts)): "x" * 100}))
    assert run(root, small=[flag for flag in SMALL if flag != "--quiet"]) == 0
    curation = {key: metadata["curation"] for key, metadata in metadata_of(root).items()}
    assert curation[keys[0]]["tokens"] == {"given": 100, "read": 75}
    assert all("tokens" not in curation[key] for key in keys[1:]), "absent where all was read"
    assert receipt(root)["notes"]["prompts_cut"] == 1
    told = "1 of 10 prompts are longer than the 75 tokens that the model reads; their ends were not read"
    assert receipt(root)["warnings"] == [told]
    assert "10 images generated, 1 prompts longer than what the model reads" in capsys.readouterr().err.splitlines()[-1]


def test_a_suffix_arrives_behind_a_long_prompt(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two suffixes give two pictures, also where the prompt alone fills the text encoder."""
    long = "A photo of " + "a tall teacher in a red coat " * 10
    keys = change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update(dict.fromkeys(prompts, long)))
    assert run(root, "--prompt_suffix", ", film photography") == 0
    films = {key: metadata["sha256"] for key, metadata in metadata_of(root).items()}
    curation = metadata_of(root)[keys[0]]["curation"]
    assert curation["prompt"] == long.strip(), "the caption stays whole"
    # 57 letters and 16 of the suffix are 73 tokens of the embedded model; the next word would make them 80
    assert curation["prompt_shortened"] == "A photo of" + " a tall teacher in a red coat" * 2 + " a tall"
    assert curation["tokens"] == {"given": 8 + 10 * 22 + 16, "read": 73}
    assert (receipt(root)["notes"]["prompts_cut"], receipt(root)["notes"]["prompts_shortened"]) == (10, 10)
    with on_batch(monkeypatch) as sizes:
        assert run(root, "--rerun", "--prompt_suffix", ", film photography") == 0
        assert sizes == [], "the same recipe"
        assert run(root, "--rerun", "--prompt_suffix", ", an oil painting") == 0
    assert len(films) == 10 == sum(sizes)
    assert all(films[key] != metadata["sha256"] for key, metadata in metadata_of(root).items())


def test_a_suffix_that_cannot_arrive_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "--prompt_suffix", "," * 80) == 2
    assert "--prompt_suffix: it has 80 tokens" in capsys.readouterr().err
    assert not (root / f"edits/{SHARD}.tar").exists()


def test_a_prompt_for_which_the_suffix_leaves_no_room_is_rejected(root: Path) -> None:
    keys = change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({next(iter(prompts)): "字字 x"}))
    assert run(root, "--prompt_suffix", "," * 73) == 0
    assert rejects(root)[keys[0]] == "no_room_for_prompt"


@pytest.mark.parametrize("flags", [[], ["--text_batches", "2"], ["--size", "original"]], ids=" ".join)
def test_the_same_work_gives_the_same_bytes(flags: list[str], tmp_path: Path) -> None:
    one, two = (make_input(tmp_path / name) for name in ("one", "two"))
    assert run(one, *flags) == run(two, *flags) == 0
    assert (one / f"edits/{SHARD}.tar").read_bytes() == (two / f"edits/{SHARD}.tar").read_bytes()


def test_sizes_follow_the_originals(root: Path) -> None:
    assert run(root, "--size", "original", "--height", "96", "--width", "96") == 0
    for name, data in read_tar(root).items():
        if name.endswith(".jpg"):
            metadata = metadata_of(root)[name.removesuffix(".jpg")]
            curation = metadata["curation"]
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (metadata["width"], metadata["height"]) == tuple(curation["size"])
                wide, high = image.size
            assert wide % 16 == high % 16 == 0 and 0.6 * 96 * 96 <= wide * high <= 96 * 96
            assert (wide > high) == (curation["original_width"] > curation["original_height"])


def test_two_processes_share_the_shards_and_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for target in (one, two):
        for shard in (SHARD, "00000004", "00000005"):
            make_input(target, 6, shard)
    assert run(one) == 0
    command = [
        sys.executable,
        "03_generate_images_multigpu.py",
        "--input",
        f"{two}/prompts",
        "--output",
        f"{two}/edits",
    ]
    assert subprocess.run([*command, *SMALL, "--num_gpus", "2"], cwd=ROOT, check=False, timeout=120).returncode == 0
    for shard in (SHARD, "00000004", "00000005"):
        assert (one / f"edits/{shard}.tar").read_bytes() == (two / f"edits/{shard}.tar").read_bytes()


# ---- again


def test_a_finished_stage_loads_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(root) == 0
    monkeypatch.setattr(stage.GenerateImages, "open", lambda *_: pytest.fail("nothing is pending"))
    assert run(root) == 0


def test_a_rerun_makes_only_the_samples_whose_prompt_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(root) == 0
    before = read_tar(root)

    def edit(prompts: dict[str, str]) -> None:
        prompts[list(prompts)[3]] = "Something else"

    keys = change(root / f"prompts/{SHARD}.json", edit)
    with on_batch(monkeypatch) as batches:
        assert run(root) == 0
    assert batches == [1]
    assert {name: receipt(root)["notes"][name] for name in ("reused", "generated")} == {"reused": 9, "generated": 1}
    after = read_tar(root)
    assert list(after) == list(before), "in the shard's order"
    assert {name for name in after if after[name] != before[name]} == {f"{keys[3]}.{s}" for s in ("jpg", "txt", "json")}


def test_metadata_that_changed_is_taken_up_without_a_new_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(root) == 0
    keys = change(root / f"edits/{SHARD}.json", lambda value: next(iter(value.values())).update(url="https://new"))
    with on_batch(monkeypatch) as batches:
        assert run(root) == 0
    assert batches == []
    assert metadata_of(root)[keys[0]]["url"] == "https://new"


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ([], 0),
        (["--batch_size", "2"], 0),
        (["--text_batches", "1"], 0),
        (["--seed", "1"], 10),
        (["--steps", "2"], 10),
        (["--quality", "80"], 10),
        (["--width", "80"], 10),
        (["--prompt_suffix", "!"], 10),
        (["--dtype", "bfloat16"], 10),
        (["--guidance", "3", "--negative_prompt", "x"], 10),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_makes_a_rerun_make_a_picture_again(
    flags: list[str], made: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(root) == 0
    before = (root / f"edits/{SHARD}.tar").read_bytes()
    if flags:
        assert run(root, *flags) == 2, "other options are refused without --rerun"
    with on_batch(monkeypatch) as batches:
        assert run(root, *flags, "--rerun") == 0
    assert sum(batches) == made
    assert ((root / f"edits/{SHARD}.tar").read_bytes() == before) == (made == 0)


def test_a_picture_that_is_not_what_its_json_says_is_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(root) == 0
    path = root / f"edits/{SHARD}.tar"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[512 + 1500] ^= 1  # inside the first picture
    path.write_bytes(data)
    with on_batch(monkeypatch) as batches:
        assert run(root, "--rerun") == 0
    assert batches == [1]
    assert len(read_tar(root)) == 30


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\0" * 10240])
def test_a_file_that_is_no_edits_is_replaced(content: bytes, root: Path) -> None:
    (root / f"edits/{SHARD}.tar").write_bytes(content)
    assert run(root) == 0
    assert len(read_tar(root)) == 30


def test_prompts_that_went_away_take_their_edits_along(root: Path) -> None:
    assert run(root) == 0
    (root / f"prompts/{SHARD}.json").write_text("{}")
    assert run(root) == 0
    assert not (root / f"edits/{SHARD}.tar").exists()
    assert receipt(root)["counts"]["in"] == 0


# ---- stopped, killed


@pytest.mark.parametrize("flags", [[], ["--text_batches", "2"]], ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_stopped_by_a_signal_it_goes_on_from_the_last_batch(
    number: signal.Signals, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, root = (make_input(tmp_path / name, 18) for name in ("undisturbed", "stopped"))
    assert run(undisturbed, *flags) == 0
    with on_batch(monkeypatch, lambda batch: os.kill(os.getpid(), number) if batch == 3 else None) as batches:
        assert run(root, *flags) == 75
    assert batches == [4, 4, 4]
    assert not (root / f"edits/{SHARD}.tar").exists()
    with on_batch(monkeypatch) as batches:
        assert run(root, *flags) == 0
    # USR1 lets the third batch finish; TERM ends it between steps, with the first two saved
    assert batches == ([4, 2] if number == signal.SIGUSR1 else [4, 4, 2])
    assert (root / f"edits/{SHARD}.tar").read_bytes() == (undisturbed / f"edits/{SHARD}.tar").read_bytes()
    assert receipt(root)["notes"]["recovered"] == 18 - sum(batches)
    assert not [path for path in (root / "edits/_partial").rglob("*") if path.is_file()]


def test_a_checkpoint_that_was_cut_short_costs_its_last_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_batch(monkeypatch, lambda batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 2 else None):
        assert run(root) == 75
    (log,) = (path for path in (root / "edits/_partial").rglob("*") if path.is_file())
    os.truncate(log, log.stat().st_size - 10)  # as a kill in the middle of a write leaves it
    with on_batch(monkeypatch) as batches:
        assert run(root) == 0
    assert batches == [4, 2], "the whole second batch, not its last picture alone"
    assert len(read_tar(root)) == 30


def test_a_checkpoint_of_other_prompts_is_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_batch(monkeypatch, lambda batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 2 else None):
        assert run(root, "--text_batches", "0") == 75
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({next(iter(prompts)): "Another"}))
    with on_batch(monkeypatch) as batches:
        assert run(root) == 0
    assert batches == [4, 2], "the first batch again, the second from the checkpoint"


# ---- several shards, and folders of older versions


def test_the_next_shard_begins_before_this_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has the next shard's first batch while this one is written, and the bytes are those of one by one."""
    one, two = (tmp_path / name for name in ("one", "two"))
    shards = [SHARD, "00000004", "00000005"]
    for target in (one, two):
        for shard in shards:
            make_input(target, 6, shard)
    told: list[str] = []
    real_write, real_make = stage.GenerateImages._write, stage.GenerateImages._make

    def write(self: Any, work: Any, *args: Any) -> None:
        for _ in range(100 if work.shard.id != shards[-1] else 0):  # a slow filesystem, until the next one has begun
            if any(line == f"make {shards[shards.index(work.shard.id) + 1]}" for line in told):
                break
            time.sleep(0.1)
        told.append(f"write {work.shard.id}")
        real_write(self, work, *args)

    def make(self: Any, work: Any, *args: Any) -> Any:
        told.append(f"make {work.shard.id}")
        return real_make(self, work, *args)

    with monkeypatch.context() as patch:
        patch.setattr(stage.GenerateImages, "_write", write)
        patch.setattr(stage.GenerateImages, "_make", make)
        assert run(one) == 0
    made = [line.split()[1] for line in told if line.startswith("make")]
    assert made == [shard for shard in shards for _ in range(2)], "one shard after the other on the device"
    for first, second in pairwise(shards):
        assert told.index(f"make {second}") < told.index(f"write {first}")
    with monkeypatch.context() as patch:
        patch.setattr(stage.GenerateImages, "shards_in_flight", 1)
        assert run(two) == 0
    for shard in shards:
        assert (one / f"edits/{shard}.tar").read_bytes() == (two / f"edits/{shard}.tar").read_bytes()


def test_a_worker_holds_one_shard_until_it_is_nearly_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers and two shards, each gets one."""
    monkeypatch.setattr("curation.generate.encode._ENDS_SOON_S", -1.0)
    root = tmp_path / "data"
    for shard in (SHARD, "00000004"):
        make_input(root, 6, shard)
    claims = root / "edits" / "_claims" / NAME
    held: list[int] = []
    with on_batch(monkeypatch, lambda batch: held.append(len(list(claims.rglob("*0000000*"))))):
        assert run(root) == 0
    assert held[:2] == [1, 1], "the other shard is free until the first one is made"


def test_a_stop_gives_both_shards_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "stopped"
    shards = [SHARD, "00000004", "00000005"]
    for target in (undisturbed, root):
        for shard in shards:
            make_input(target, 10, shard)
    assert run(undisturbed) == 0
    with on_batch(monkeypatch, lambda batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 5 else None) as batches:
        assert run(root) == 75
    assert len(batches) == 5
    assert not [path for path in (root / f"edits/_claims/{NAME}").rglob("*0000000*") if path.is_file()]
    with on_batch(monkeypatch) as rest:
        assert run(root) == 0
    assert len(batches) + len(rest) == 9, "no batch was lost"
    for shard in shards:
        assert (root / f"edits/{shard}.tar").read_bytes() == (undisturbed / f"edits/{shard}.tar").read_bytes()


def test_a_folder_of_an_older_version_goes_on_with_its_speed_ups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They change pictures by rounding, so that a folder has one value throughout; new folders have the new ones."""
    old = ["--no-channels_last", "--no-fuse_qkv", "--text_batches", "0"]
    whole, root, new = (tmp_path / name for name in ("whole", "root", "new"))
    for target in (whole, root, new):
        for shard in (SHARD, "00000004"):
            make_input(target, 6, shard)
    loud = [flag for flag in SMALL if flag != "--quiet"]
    assert run(whole, *old) == run(root, *old, "--shards", SHARD) == run(new) == 0
    path = root / f"edits/_receipts/{NAME}/_epoch.1.json"
    younger = ("true_cfg_scale", "config", "lora", "vae", "quantize")
    change(path, lambda record: [record["options"].pop(name) for name in younger])
    capsys.readouterr()
    assert run(root, small=loud) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "was begun so and goes on so" in line]
    assert len(told) == 1
    assert "--channels_last False, --fuse_qkv False, --text_batches 0: " in told[0]
    assert told[0].endswith("new folders and --rerun use True, True, 4")
    for shard in (SHARD, "00000004"):
        assert (root / f"edits/{shard}.tar").read_bytes() == (whole / f"edits/{shard}.tar").read_bytes()
    assert len(list(path.parent.glob("_epoch.*.json"))) == 1
    options = json.loads((new / f"edits/_receipts/{NAME}/_epoch.1.json").read_bytes())["options"]
    assert (options["channels_last"], options["fuse_qkv"], options["text_batches"]) == (True, True, 4)


# ---- bad input


def test_bad_samples_are_told_and_the_sound_ones_come_out(root: Path, tmp_path: Path) -> None:
    hostile = {
        "../../escape": "unsafe_key",
        "/etc/passwd": "unsafe_key",
        "a/../../b": "unsafe_key",
        "a//b": "unsafe_key",
        "": "unsafe_key",
        "nul\x00byte": "unsafe_key",
        "back\\slash": "unsafe_key",
        "two.dots": "unsafe_key",
        "x" * 300: "unsafe_key",
        "unknown-0": "no_metadata",
    }
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({f"{key}.json": "p" for key in hostile}))
    values = {
        "number-0": 7,
        "list-0": ["a"],
        "null-0": None,
        "empty-0": "",
        "blank-0": " \n\t ",
        "controls-0": "\x00\x01",
    }
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({f"{k}.json": v for k, v in values.items()}))
    odd = {"odd-0": [1, 2]} | {key: {"caption": "x"} for key in values}
    change(root / f"edits/{SHARD}.json", lambda metadata: metadata.update({f"{k}.json": v for k, v in odd.items()}))
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({"odd-0.json": "p"}))
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({"folder/deep-0.json": "In a folder"}))
    change(root / f"edits/{SHARD}.json", lambda metadata: metadata.update({"folder/deep-0.json": {"caption": 5}}))
    listing = sorted(path for path in tmp_path.rglob("*") if "edits" not in path.parts)
    assert run(root, "--max_error_rate", "0.9") == 0
    expected = hostile | {"number-0": "prompt_not_text", "list-0": "prompt_not_text", "null-0": "prompt_not_text"}
    expected |= {
        "empty-0": "empty_prompt",
        "blank-0": "empty_prompt",
        "controls-0": "empty_prompt",
        "odd-0": "bad_metadata",
    }
    assert rejects(root) == expected
    counts = receipt(root)["counts"]
    assert (counts["in"], counts["kept"], sum(counts["failed"].values())) == (28, 11, 17)
    members = read_tar(root)
    assert len(members) == 33 and "folder/deep-0.jpg" in members
    assert json.loads(members["folder/deep-0.json"])["curation"]["original_caption"] == 5
    assert sorted(path for path in tmp_path.rglob("*") if "edits" not in path.parts) == listing


@pytest.mark.parametrize(
    "size", [{}, {"width": 0, "height": 5}, {"width": "640", "height": 480}, {"width": True, "height": 1}]
)
def test_an_unknown_original_size_gets_the_fixed_one(size: dict[str, Any], root: Path) -> None:
    def edit(metadata: dict[str, Any]) -> None:
        for value in metadata.values():
            del value["width"], value["height"]
            value.update(size)

    change(root / f"edits/{SHARD}.json", edit)
    assert run(root, "--size", "original") == 0
    assert all((value["width"], value["height"]) == (64, 64) for value in metadata_of(root).values())


def test_too_many_bad_samples_fail_the_shard_and_no_other(root: Path) -> None:
    make_input(root, 4, "00000004")
    change(root / f"edits/{SHARD}.json", lambda metadata: [metadata.pop(name) for name in list(metadata)[:5]])
    assert run(root) == 1
    assert "5 of 10 samples failed (5 no_metadata)" in receipt(root)["error"]["message"]
    assert not (root / f"edits/{SHARD}.tar").exists()
    assert len(read_tar(root, "00000004")) == 12


@pytest.mark.parametrize("content", ["", "[]", '"text"', "{", '{"a.json": "b"', '{"no suffix": "b"}', "\x00"])
def test_prompts_that_are_no_dictionary_fail_their_shard(content: str, root: Path) -> None:
    make_input(root, 4, "00000004")
    (root / f"prompts/{SHARD}.json").write_text(content)
    assert run(root) == 1
    assert f"{SHARD}.json" in receipt(root)["error"]["message"]
    assert len(read_tar(root, "00000004")) == 12


def test_no_metadata_at_all_is_one_clear_line(root: Path) -> None:
    (root / f"edits/{SHARD}.json").unlink()
    assert run(root) == 1
    assert "no metadata of the samples: neither" in receipt(root)["error"]["message"]
    assert "that stage 01 wrote as --edits" in receipt(root)["error"]["message"]


def test_a_new_folder_for_the_pictures_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each shard would fail, after the model has been loaded."""
    for flags in ([], ["--dry_run"]):
        assert int(stage.main(["--input", f"{root}/prompts", "--output", f"{root}/images", "--embedded", *flags])) == 2
        told = capsys.readouterr().err
        assert f"--output: there is no {root}/images: give the folder that stage 01 wrote as --edits" in told
    assert not (root / "images").exists()


def test_an_empty_shard_is_done(root: Path) -> None:
    (root / f"prompts/{SHARD}.json").write_text("{}")
    (root / f"edits/{SHARD}.json").unlink()
    assert run(root) == 0
    assert receipt(root)["status"] == "done" and "no samples" in receipt(root)["warnings"][0]
    assert not (root / f"edits/{SHARD}.tar").exists()


def test_blank_pictures_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.GenerateImages.open

    def open_and_spoil(self: Any, allocation: Any) -> None:
        real(self, allocation)
        spoil(self.backend, 1, float("nan"))

    monkeypatch.setattr(stage.GenerateImages, "open", open_and_spoil)
    assert run(root, "--max_error_rate", "0.5") == 0
    assert set(rejects(root).values()) == {"blank_image"}
    assert receipt(root)["counts"] == {"in": 10, "kept": 7, "dropped": {}, "failed": {"blank_image": 3}}
    assert len(read_tar(root)) == 21


def test_compiling_is_recorded_and_its_code_is_no_output(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler itself, which takes minutes: functions are handed back as they are."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    assert run(root, "--compile", "blocks") == 0
    assert receipt(root)["notes"]["compiled"] == {"how": "blocks", "kernels": "chosen without trials"}
    assert {metadata["curation"]["compile"] for metadata in metadata_of(root).values()} == {"blocks"}
    code = root / "edits/_compile_cache"
    assert code.stat().st_mode & 0o777 == 0o700 and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == code
    assert not [output for output in receipt(root)["outputs"] if "_compile_cache" in str(output)]
    assert run(root, "--rerun") == 0
    assert receipt(root)["notes"]["reused"] == 0, "those pictures are of compiled code"
    assert "compiled" not in receipt(root)["notes"]
    assert not any("compile" in metadata["curation"] for metadata in metadata_of(root).values())


def test_a_compiler_that_is_missing_is_told_before_the_model_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def compile_without(*_: Any, **__: Any) -> Any:
        raise InvalidCxxCompiler()

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.compile", compile_without)
    monkeypatch.setattr("curation.backends.generate.diffusers.load_pipeline", None)
    assert run(root, "--compile", "full") == 2
    told = capsys.readouterr().err
    assert "cannot be compiled here (InvalidCxxCompiler: " in told and "use --compile none" in told


def test_out_of_memory_loses_nothing_and_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    real = stage.GenerateImages.open

    def open_with_little_memory(self: Any, allocation: Any) -> None:
        real(self, allocation)
        limit_memory(self.backend, 2, lambda: torch.OutOfMemoryError("CUDA out of memory."))

    monkeypatch.setattr(stage.GenerateImages, "open", open_with_little_memory)
    assert run(root) == 0
    assert len(read_tar(root)) == 30
    assert receipt(root)["notes"]["batch_shrunk_to"] == {"64x64": 2}
    assert any("memory ran out" in warning for warning in receipt(root)["warnings"])
    (remembered,) = (root / "edits/_batch_sizes").rglob("*.json")
    assert json.loads(remembered.read_bytes())["batch_size"] == 2


def test_a_device_that_fails_blames_no_shard(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, works = stage.GenerateImages.open, 0

    def open_on_a_bad_device(self: Any, allocation: Any) -> None:
        real(self, allocation)
        good = iter([False] * works + [True] * 99)
        limit_memory(self.backend, -1, lambda: RuntimeError("CUDA error: device not ready"), unless=good)

    monkeypatch.setattr(stage.GenerateImages, "open", open_on_a_bad_device)
    assert run(root) == 2, "it never worked"
    works = 2
    assert run(root) == 69
    assert "failed: CUDA error: device not ready; this process gives its shards back" in capsys.readouterr().err
    assert not list((root / "edits/_receipts").rglob(f"{SHARD}.json"))
    monkeypatch.setattr(stage.GenerateImages, "open", real)
    assert run(root) == 0
    assert receipt(root)["notes"]["generated"] == 10


# ---- loose files


def make_loose(root: Path) -> dict[str, bytes]:
    """The metadata as upstream's first stage leaves it: edits/<shard>/<key>.json."""
    dictionary = root / f"edits/{SHARD}.json"
    metadata = json.loads(dictionary.read_bytes())
    dictionary.unlink()
    (root / f"edits/{SHARD}").mkdir()
    for name, value in metadata.items():
        write(root / f"edits/{SHARD}" / name, value)
    return read_loose(root)


def read_loose(root: Path) -> dict[str, bytes]:
    folder = root / f"edits/{SHARD}"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_loose_metadata_is_read(root: Path, tmp_path: Path) -> None:
    other = make_input(tmp_path / "other")
    before = make_loose(root)
    assert run(root) == run(other) == 0
    assert (root / f"edits/{SHARD}.tar").read_bytes() == (other / f"edits/{SHARD}.tar").read_bytes()
    assert read_loose(root) == before


def test_the_files_layout_and_its_rerun(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loose json is replaced by the edited one, and a rerun still knows the original."""
    originals = {name: json.loads(data) for name, data in make_loose(root).items()}
    assert run(root, "--edits_layout", "files") == 0
    first = read_loose(root)
    assert not (root / f"edits/{SHARD}.tar").exists()
    assert {name.rpartition(".")[2] for name in first} == {"jpg", "txt", "json"} and len(first) == 30
    for name, value in originals.items():
        curation = json.loads(first[name])["curation"]
        assert (curation["original_caption"], curation["original_sha256"]) == (value["caption"], value["sha256"])
    with on_batch(monkeypatch) as batches:
        assert run(root, "--edits_layout", "files", "--rerun") == 0
    assert batches == []
    assert read_loose(root) == first
    assert run(root, "--edits_layout", "files", "--rerun", "--seed", "1") == 0
    again = json.loads(read_loose(root)[next(iter(originals))])["curation"]
    assert again["original_caption"].startswith("the old caption") and "previous" not in again


def test_a_link_in_the_edits_folder_leads_nowhere(root: Path, tmp_path: Path) -> None:
    make_loose(root)
    secret = tmp_path / "secret"
    secret.mkdir()
    write(secret / "x-0.json", {"caption": "secret"})
    (root / f"edits/{SHARD}/way").symlink_to(secret)
    change(root / f"prompts/{SHARD}.json", lambda prompts: prompts.update({"way/x-0.json": "p"}))
    assert run(root) == 0
    assert rejects(root) == {"way/x-0": "bad_metadata"}


# ---- wrong commands


def test_source_shards_are_not_replaced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--output may name their folder by mistake, in which stage 01 has put its metadata."""
    source = root / f"edits/{SHARD}.tar"
    shutil.copy(EXAMPLES / "00000003.tar", source)
    before = source.read_bytes()
    for more in ((), ("--dry_run",), ("--rerun",)):
        assert run(root, *more) == 2
        assert f"{source} holds samples that were not edited" in capsys.readouterr().err
        assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere/flux"], "--model /nowhere/flux: there is no such folder"),
        (["--model", str(ROOT / "docs")], "not a diffusers pipeline"),
        (["--embedded", "--height", "65", "--width", "64"], "multiples of 8; the nearest are --width 64 --height 64"),
        (["--embedded", "--model", "stabilityai/sd-turbo"], "--embedded brings its own model"),
        (["--embedded", "--text_tokens", "128"], "StableDiffusionPipeline takes no max_sequence_length"),
        (["--embedded", "--quality", "0"], "--quality must be between 1 and 100"),
        (["--embedded", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--embedded", "--guidance", "-1"], "--guidance must be at least 0"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    flags: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, small=flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ") and message in line


def test_prompts_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edits").mkdir()
    assert run(tmp_path) == 2
    assert "does not exist" in capsys.readouterr().err


def test_no_hub_and_no_model_is_code_2_also_of_a_dry_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(root, small=["--quiet"]) == 2
    assert "black-forest-labs/FLUX.1-schnell" in capsys.readouterr().err
    assert run(root, small=["--quiet", "--dry_run"]) == 2
    told = capsys.readouterr()
    assert "1 pending" in told.out
    assert "black-forest-labs/FLUX.1-schnell" in told.err


@pytest.mark.parametrize("name", ["sdxl-turbo", "SDXL_Turbo", "stabilityai/sdxl-turbo"])
def test_a_short_name_and_its_hub_id_record_the_same(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    def recorded(model: str) -> dict[str, object]:
        options = stage.Options(input=f"{root}/prompts", output=f"{root}/edits", model=model, dry_run=True)
        options.check()
        return dict(stage.GenerateImages(options).fingerprint())

    cache, commit = tmp_path / "models--stabilityai--sdxl-turbo", "c" * 40
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "model_index.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = recorded(name)
    assert (found["model"], found["revision"], found["steps"]) == ("stabilityai/sdxl-turbo", commit, 1)
    assert found == recorded("stabilityai/sdxl-turbo")


def test_a_name_that_is_no_model_is_told_before_anything_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--input", str(tmp_path / "none"), "--output", str(tmp_path / "edits")]
    assert stage.main([*flags, "--model", "z-image-trubo"]) == 2
    told = capsys.readouterr().err
    assert "--model z-image-trubo: no model has this short name" in told
    assert "Did you mean z-image-turbo (Tongyi-MAI/Z-Image-Turbo)" in told and "--list_models" in told
    assert not (tmp_path / "edits").exists()


def test_a_folder_that_was_begun_without_a_preset_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, model = (
        make_input(tmp_path / "data", count=1),
        tmp_path / "FLUX.2-klein-4B",
    )  # by its name; a smaller pipeline is quicker
    save_tiny_sd(model)
    flags = ["--model", str(model), "--height", "64", "--width", "64", "--dtype", "float32", "--quiet"]
    with monkeypatch.context() as older:
        older.setattr(stage, "preset_for", lambda name, folder=None: (None, Preset(model=name)))
        assert run(root, "--steps", "1", "--guidance", "0", small=flags) == 0
    path = root / "edits" / "_receipts" / stage.GenerateImages.name / "_epoch.1.json"
    change(path, lambda record: record["options"].update(steps=None, guidance=None))
    assert run(root, small=flags) == 0
    assert run(root, "--dry_run", small=flags) == 0
    assert len(list(path.parent.glob("_epoch.*.json"))) == 1, "it goes on under the options that it was begun with"
    change(path, lambda record: record["options"].update(steps=1))  # as if --steps had been given
    assert run(root, "--steps", "1", "--dry_run", small=flags) == 0
    assert preset_for(str(model))[1].steps == 4
    assert run(root, "--rerun", "--dry_run", small=flags) == 0
    assert "1 pending" in capsys.readouterr().out, "--rerun has the preset"


def test_a_model_without_a_preset_is_told_with_its_cost(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody pays for fifty steps unknowingly."""
    save_tiny_sd(tmp_path / "my-own-turbo")
    flags = ["--model", str(tmp_path / "my-own-turbo"), "--dtype", "float32", "--guidance", "1", "--batch_size", "4"]
    assert run(root, "--steps", "2", small=[*flags, "--height", "64", "--width", "64"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "no preset is known for it" in line]
    told = re.search(r"2 steps, guidance 1, 64×64, batches of 4: about (\S+) TFLOP a picture", line)
    assert told and 1e-5 < float(told[1]) < 1e-2
    assert str(tmp_path) not in line.split("--model")[1]


def test_another_vae_is_recorded_and_makes_other_pictures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import AutoencoderTiny

    small = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**small).save_pretrained(tmp_path / "my-vae")
    flags = ["--vae", str(tmp_path / "my-vae")]
    assert run(root, *flags) == 0
    image = {json.dumps(value["curation"]["models"]["image"]) for value in metadata_of(root).values()}
    [vae] = [json.loads(model)["vae"] for model in image]
    assert vae["name"] == "my-vae" and vae["digest"].startswith("local-")
    path = root / "edits" / "_receipts" / NAME / "_epoch.1.json"
    recorded = json.loads(path.read_bytes())["options"]
    assert (recorded["vae"], recorded["lora"], recorded["quantize"]) == (vae, None, None)
    assert run(root) == 2 and "vae" in capsys.readouterr().err
    with on_batch(monkeypatch) as sizes:
        assert run(root, *flags, "--rerun") == 0
        assert sizes == [], "the same recipe"
        assert run(root, "--rerun") == 0
    assert sum(sizes) == 10
    assert all("vae" not in value["curation"]["models"]["image"] for value in metadata_of(root).values())


def test_what_changes_pictures_and_cannot_be_is_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--quantize", "fp8"], "--quantize fp8: needs --dtype bfloat16, not float32"),
        (["--lora", "x:99"], "--lora x:99: the scale behind the colon must be between -10 and 10, and not 0"),
        (["--vae", str(root)], "is no autoencoder of diffusers"),
        (["--config", "a/b"], "--embedded brings its own model: leave --model, --config"),
    ):
        assert run(root, *flags) == 2
        assert message in capsys.readouterr().err


def test_a_model_in_one_file_is_recorded_with_its_configuration(root: Path, tmp_path: Path) -> None:
    from tests.backends.test_generate_parts import save_single_file

    save_tiny_sd(tmp_path / "tiny-sd")
    file = save_single_file(tmp_path / "tiny-sd", tmp_path / "my-sd.safetensors")
    small = ["--model", str(file), "--config", str(tmp_path / "tiny-sd"), "--steps", "1", "--guidance", "0", "--quiet"]
    assert run(root, small=[*small, "--dtype", "float32", "--height", "64", "--width", "64"]) == 0
    [image] = {json.dumps(value["curation"]["models"]["image"]) for value in metadata_of(root).values()}
    model = json.loads(image)
    assert (model["name"], model["config"]["name"]) == ("my-sd.safetensors", "tiny-sd")
    assert str(tmp_path) not in image


def test_a_gpu_that_torch_cannot_use_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from tests.backends.tiny_pipelines import BUILDERS

    if torch.cuda.is_available():
        pytest.skip("this torch can")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert run(root) == 0, "the stand-in asks for no GPU"
    BUILDERS["tiny-FLUX.1-schnell"](tmp_path / "tiny-FLUX.1-schnell")
    small = ["--model", str(tmp_path / "tiny-FLUX.1-schnell"), "--quiet", "--height", "64", "--width", "64"]
    assert run(root, "--rerun", small=small) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_real_model_folder_is_recorded_by_its_name(root: Path, tmp_path: Path) -> None:
    from tests.backends.tiny_pipelines import BUILDERS

    BUILDERS["tiny-FLUX.1-schnell"](tmp_path / "tiny-FLUX.1-schnell")
    small = ["--model", str(tmp_path / "tiny-FLUX.1-schnell"), "--quiet", "--height", "64", "--width", "64"]
    assert run(root, small=small) == 0
    (curation,) = {
        json.dumps(value["curation"]["models"]): value["curation"] for value in metadata_of(root).values()
    }.values()
    assert curation["models"]["image"]["name"] == "tiny-FLUX.1-schnell"
    assert curation["models"]["image"]["revision"].startswith("local-")
    assert (curation["steps"], curation["text_tokens"]) == (2, 256)
    moved = copy_pipeline(tmp_path / "tiny-FLUX.1-schnell", tmp_path / "elsewhere" / "tiny-FLUX.1-schnell")
    assert run(root, small=["--model", str(moved), *small[2:]]) == 0, "the same model wherever it lies"


@pytest.mark.parametrize(
    ("environment", "flags", "workers"),
    [
        ({}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [], 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ["--num_gpus", "2"], 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ["--workers", "3"], 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NTASKS": "4"}, [], 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NTASKS": "1"}, [], 4),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["--num_gpus", "2", "--device", "cpu"], 2),
    ],
    ids=str,
)
def test_one_process_per_gpu(
    environment: dict[str, str], flags: list[str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = stage.parse_options(stage.Options, ["--input", "p", "--output", "e", *flags])
    if not environment and visible_gpus():
        pytest.skip("this machine has a GPU")
    assert stage.one_process_per_gpu(options).workers == workers


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    options = stage.parse_options(stage.Options, ["--input", "p", "--output", "e", "--num_gpus", "4"])
    with pytest.raises(UsageError, match="--num_gpus 4: only 2 are visible here"):
        stage.one_process_per_gpu(options)
