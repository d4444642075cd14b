"""The edited sample: its metadata and back again, what a recipe is, names that could lead out of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.edits import (
    REPLACED_FIELDS,
    PreviousEdits,
    checked_prompt,
    edited_metadata,
    json_of,
    loose_path,
    original_metadata,
    recipe,
    txt_of,
    unsafe_key,
    with_suffix,
)
from curation.errors import LostClaim, SampleError
from curation.tar.samples import TarWriter

STAGE = "03_generate_images"
CURATION = {"prompt": "a prompt", "seed": 1, "stages": {STAGE: 1}, "models": {"image": {"name": "m", "revision": "r"}}}

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*REPLACED_FIELDS, "uid", "url", "exif", "curation"]) | st.text(max_size=6)


@given(original=st.dictionaries(names, values, max_size=8))
def test_an_edit_can_be_undone_and_keeps_every_other_field(original: dict[str, Any]) -> None:
    edited = edited_metadata(original, CURATION, "ab" * 32, 64, 48)
    assert json.loads(json_of(edited)) == edited
    for name, value in original.items():
        if name not in (*REPLACED_FIELDS, "curation"):
            assert edited[name] == value
    assert (edited["caption"], edited["sha256"], edited["width"], edited["height"]) == ("a prompt", "ab" * 32, 64, 48)
    assert list(edited)[-1] == "curation"
    assert original_metadata(edited, STAGE) == original
    assert original_metadata(edited, "another stage") == edited
    again = edited_metadata(original_metadata(edited, STAGE), CURATION, "ab" * 32, 64, 48)
    assert again == edited


def test_lone_surrogates_survive_in_json_and_not_in_text() -> None:
    edited = edited_metadata({"caption": "a\ud800"}, CURATION, "", 1, 1)
    assert json.loads(json_of(edited))["curation"]["original_caption"] == "a\ud800"
    assert txt_of("a prompt") == b"a prompt"


@pytest.mark.parametrize(
    "field", ["prompt", "prompt_suffix", "negative_prompt", "seed", "steps", "guidance", "size", "quality"]
)
def test_a_recipe_changes_with_what_decides_the_picture(field: str) -> None:
    assert recipe(CURATION, STAGE) != recipe({**CURATION, field: "other"}, STAGE)


@pytest.mark.parametrize("field", ["true_cfg_scale", "prompt_shortened"])
def test_a_later_field_changes_only_recipes_that_have_it(field: str) -> None:
    assert recipe(CURATION, STAGE) == recipe({**CURATION, field: None}, STAGE)
    assert recipe(CURATION, STAGE) != recipe({**CURATION, field: "other"}, STAGE)


def test_a_recipe_knows_model_and_version_and_ignores_the_rest() -> None:
    assert recipe(CURATION, STAGE) == recipe({**CURATION, "group": "x", "original_caption": "y"}, STAGE)
    assert recipe(CURATION, STAGE) == recipe({**CURATION, "stages": {STAGE: 1, "02": 9}}, STAGE)
    assert recipe(CURATION, STAGE) != recipe({**CURATION, "stages": {STAGE: 2}}, STAGE)
    other = {"image": {"name": "m", "revision": "other"}}
    assert recipe(CURATION, STAGE) != recipe({**CURATION, "models": other}, STAGE)
    for odd in ({}, {"models": 5, "stages": []}, {"models": {}, "stages": None}):
        assert recipe(odd, STAGE) != recipe(CURATION, STAGE)


@pytest.mark.parametrize(
    "key", ["000000001234", "0041c043f693222ade350169e6a4a663-0", "a/b/c", "ünïcode 東京", "_x", "a-b_c+d"]
)
def test_keys_that_are_fine(key: str) -> None:
    assert unsafe_key(key) == ""


@pytest.mark.parametrize(
    "key",
    ["", ".", "..", "../x", "a/../b", "/x", "x/", "a//b", "./a", "a/./b", "a.b", ".hidden", "a\0b", "a\nb", "a\\b",
     "a\x7fb", "\ud800", "x" * 241, "é" * 121, "/".join(["dir"] * 300)],
)  # fmt: skip
def test_keys_that_are_not(key: str) -> None:
    assert unsafe_key(key) != ""


@given(key=st.text(max_size=30))
def test_a_safe_key_stays_below_its_folder(key: str) -> None:
    if unsafe_key(key):
        return
    path = os.path.normpath(f"/edits/shard/{key}.jpg")
    assert path == f"/edits/shard/{key}.jpg"


def test_a_link_below_the_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard/out").symlink_to(tmp_path)
    (tmp_path / "shard/in").mkdir()
    assert loose_path(tmp_path / "shard", "in/x.jpg") == tmp_path / "shard/in/x.jpg"
    with pytest.raises(SampleError, match="unsafe_key"):
        loose_path(tmp_path / "shard", "out/x.jpg")


def test_prompts_are_one_line_of_text() -> None:
    assert checked_prompt("k", " two\nlines\x00 \ud800") == "two lines \ufffd"
    for prompt, reason in (
        (5, "prompt_not_text"),
        (None, "prompt_not_text"),
        ("", "empty_prompt"),
        ("\x01\n", "empty_prompt"),
    ):
        with pytest.raises(SampleError, match=reason):
            checked_prompt("k", prompt)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [("", "a cat"), (", sharp", "a cat, sharp"), ("sharp", "a cat sharp"), (" sharp", "a cat sharp")],
)
def test_a_suffix_is_joined_as_it_is_written(suffix: str, expected: str) -> None:
    assert with_suffix("a cat", suffix) == expected


def write_edits(path: Path, keys: list[str]) -> dict[str, list[Any]]:
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key in keys:
            jpg = f"jpg of {key}".encode()
            metadata = edited_metadata({}, CURATION, hashlib.sha256(jpg).hexdigest(), 1, 1)
            for suffix, data in (("jpg", jpg), ("txt", b"t"), ("json", json_of(metadata))):
                writer.add(f"{key}.{suffix}", data)
        writer.close()
    return dict.fromkeys(keys, recipe(CURATION, STAGE))


def test_earlier_edits_are_found_in_any_order(tmp_path: Path) -> None:
    wanted = write_edits(tmp_path / "7.tar", ["a", "b", "c", "d"])
    earlier = PreviousEdits(tmp_path, "7")
    assert set(earlier.matching({**wanted, "e": wanted["a"]}, STAGE)) == {"a", "b", "c", "d"}
    for key in ("c", "a", "d", "b"):
        assert earlier.jpg(key) == f"jpg of {key}".encode()


def test_earlier_edits_that_another_worker_replaces_are_a_lost_claim(tmp_path: Path) -> None:
    wanted = write_edits(tmp_path / "7.tar", ["a", "b"])
    earlier = PreviousEdits(tmp_path, "7")
    assert len(earlier.matching(wanted, STAGE)) == 2
    write_edits(tmp_path / "7.tar", ["b"])
    with pytest.raises(LostClaim):
        earlier.jpg("a")


def test_a_tar_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    wanted = write_edits(tmp_path / "7.tar", ["a", "b", "c"])
    with tarfile.open(tmp_path / "7.tar") as archive:
        cut = archive.getmember("c.jpg").offset_data + 3
    os.truncate(tmp_path / "7.tar", cut)
    assert set(PreviousEdits(tmp_path, "7").matching(wanted, STAGE)) == {"a", "b"}


def test_no_earlier_edits(tmp_path: Path) -> None:
    assert PreviousEdits(tmp_path, "7").matching({"a": []}, STAGE) == {}
