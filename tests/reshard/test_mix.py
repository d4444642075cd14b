"""Stage 04 with --mix: each sample gets the caption that its key chooses, and keeps the others in its json."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.__main__ import main
from curation.captioned.rows import RowFile
from curation.errors import UsageError
from curation.images import encode_jpeg
from curation.reshard.mix import Mix, own_caption
from tests import EXAMPLES
from tests.shards import contents, member, noise, raw_members, samples_of, tar_of, write_shard
from tests.stages import recaption_stub as stub
from tests.stages.harness import read_jsonl
from tests.stages.test_stage_04_regroup import Regroup, put_subset, uid

HALF = "0.5:web,0.5:synthetic"
KEYS = [f"{number:03d}" for number in range(40)]


def jpeg(number: int) -> bytes:
    return encode_jpeg(np.random.default_rng(number).integers(0, 255, (8, 12, 3), np.uint8), 90)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parts(key: str, /, **changed: Any) -> dict[str, bytes]:
    """A sample as DataComp has it; None takes a field away."""
    number = int(key)
    told = {"uid": uid(number), "caption": f"web {key}", "sha256": sha256(jpeg(number)), "exif": "{}"} | changed
    metadata = json.dumps({name: value for name, value in told.items() if value is not None}, indent=4)
    return {"jpg": jpeg(number), "json": metadata.encode(), "txt": f"web {key}".encode()}


def row(key: str, /, **changed: Any) -> dict[str, Any]:
    """As stage 05 writes it."""
    number = int(key)
    told = {
        "key": key, "shard": "0", "url": None, "uid": uid(number), "caption": f"seen {key}",
        "original_caption": f"web {key}", "sha256": sha256(jpeg(number)), "image_sha256": sha256(jpeg(number)),
        "model": "m", "revision": "1", "extra": {},
    }  # fmt: skip
    return told | changed


def put_rows(run: Regroup, rows: list[Mapping[str, Any]], shard: str = "0") -> None:
    run.put(f"recaptions/rows/{shard}.jsonl", b"".join(json.dumps(one).encode() + b"\n" for one in rows))


def put_edits(run: Regroup, *keys: str) -> None:
    """Of stage 03: another picture, whose json keeps the web's caption as that of the original."""
    edits = {}
    for key in keys:
        before = json.loads(parts(key)["json"])
        curation = {
            "original_caption": before["caption"],
            "original_sha256": before["sha256"],
            "prompt": f"asked {key}",
        }
        metadata = before | {
            "width": 12,
            "height": 8,
            "caption": f"asked {key}",
            "sha256": sha256(jpeg(1000 + int(key))),
            "curation": curation,
        }
        edits[key] = {
            "jpg": jpeg(1000 + int(key)),
            "txt": f"asked {key}".encode(),
            "json": json.dumps(metadata).encode(),
        }
    write_shard(run.root / "edits/0.tar", edits)


class Mixing(Regroup):
    mix = HALF

    def arguments(self) -> list[str]:
        return [*super().arguments(), "--captions", f"{self.root}/recaptions", "--mix", self.mix]

    def told(self, shard: str = "0") -> dict[str, dict[str, Any]]:
        """key → json.  In each sample, the txt is the caption that the json names as chosen."""
        found = {}
        for key, members in samples_of(self.root / f"hybrid/{shard}.tar").items():
            found[key] = metadata = json.loads(members["json"])
            if "caption_source" in metadata:
                assert metadata["caption"] == metadata["caption_choices"][metadata["caption_source"]]
                assert members["txt"].decode() == metadata["caption"]
        return found


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Mixing:
    (tmp_path / "edits").mkdir()
    run = Mixing(tmp_path, capsys)
    write_shard(tmp_path / "shards/0.tar", {key: parts(key) for key in KEYS})
    put_rows(run, [row(key) for key in KEYS])
    return run


# ---- the weights


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("0.3:web,0.6:synthetic", "must add up to 1, and these make 0.9"),
        ("0.6:web,0.6:synthetic", "must add up to 1, and these make 1.2"),
        ("web:0.3,synthetic:0.7", "'web' is not a weight from 0 to 1"),
        ("0.3,0.7", "'0.3' is not a weight and a name"),
        ("0.3:web,0.7:", "is not a weight and a name"),
        ("-0.3:web,1.3:synthetic", "'-0.3' is not a weight from 0 to 1"),
        ("nan:web,1:synthetic", "'nan' is not a weight from 0 to 1"),
        ("0.5:web,0.5:web", "names web twice"),
        ("1:web", "names no caption of --captions"),
        ("0.5:prompt,0.5:synthetic", "web stands for it"),
        ("0.5:../web,0.5:synthetic", "is not a weight and a name"),
        ("", "must add up to 1"),
    ],
)  # fmt: skip
def test_weights_that_make_no_sense(text: str, wrong: str, run: Mixing) -> None:
    run.mix = text
    assert run() == 2
    assert wrong in run.log or (not text and "--mix" in run.log)
    assert not (run.root / "hybrid").exists()


def test_captions_and_mix_need_each_other(run: Mixing) -> None:
    plain = Regroup.arguments(run)
    for flags, wrong in ((["--captions", "x"], "--captions needs --mix"), (["--mix", HALF], "--mix needs --captions")):
        assert run.script.main([*plain, *flags]) == 2
        assert wrong in run.capsys.readouterr().err


def test_thirds_may_be_rounded_and_shares_are_kept() -> None:
    mix = Mix.parse("0.333:web,0.333:short,0.333:long", 3)
    there = dict.fromkeys(("web", "short", "long"), "x")
    found = Counter(mix.choose(f"{number:012d}", there)[1] for number in range(30_000))
    assert all(abs(count / 30_000 - 1 / 3) < 0.01 for count in found.values()), found
    mix = Mix.parse("0.3:web,0.7:synthetic")
    found = Counter(
        mix.choose(f"{number:012d}", dict.fromkeys(("web", "synthetic"), "x"))[1] for number in range(30_000)
    )
    assert abs(found["web"] / 30_000 - 0.3) < 0.01


def test_the_choice_is_a_hash_of_seed_and_key_and_the_others_share_what_is_missing() -> None:
    mix, there = Mix.parse("0.3:web,0.4:short,0.3:long", 1), dict.fromkeys(("web", "short", "long"), "x")
    chosen = {key: mix.choose(key, there) for key in KEYS}
    assert chosen == {key: mix.choose(key, dict(reversed(there.items()))) for key in KEYS}
    assert chosen != {key: Mix.parse("0.3:web,0.4:short,0.3:long", 2).choose(key, there) for key in KEYS}
    # Known values: other bytes on another machine, or in another version, would be another dataset.
    assert [chosen[key][1] for key in KEYS[:8]] == KNOWN
    for key, (wanted, _) in chosen.items():
        without = {name: text for name, text in there.items() if name != "short"}
        assert mix.choose(key, without) == (wanted, wanted) if wanted != "short" else True
    rest = Counter(mix.choose(str(n), {"web": "x", "long": "x"})[1] for n in range(20_000))
    assert abs(rest["web"] / 20_000 - 0.5) < 0.02
    last = Mix.parse("0.3:web,0.3:short,0.4:long")
    chosen = Counter(last.choose(str(n), {"web": "x", "short": "x"}) for n in range(30_000))
    assert chosen["long", "web"] == pytest.approx(6000, rel=0.05), "not the whole to the neighbour of what is lacking"
    assert chosen["long", "short"] == pytest.approx(6000, rel=0.05)
    assert mix.choose("a", {"other": "x"})[1] == "other"


KNOWN = ["web", "web", "long", "short", "long", "web", "web", "web"]


# ---- what a sample gets


def test_each_sample_gets_the_caption_that_its_key_chooses_and_keeps_both(run: Mixing) -> None:
    assert run("--verify", "--index") == 0, run.log
    mix, told, source = Mix.parse(HALF), run.told(), run.root / "shards/0.tar"
    assert list(told) == KEYS
    for key, metadata in told.items():
        texts = {"web": f"web {key}", "synthetic": f"seen {key}"}
        name = mix.choose(key, texts)[1]
        before = json.loads(parts(key)["json"])
        assert metadata == before | {
            "caption": texts[name], "caption_source": name,
            "caption_choices": {"web": texts["web"], "prompt": "", "synthetic": texts["synthetic"]},
        }  # fmt: skip
    old, new = raw_members(source.read_bytes()), raw_members(run.result())
    assert [name for name, _ in new] == [name for name, _ in old]
    assert all(after == before for before, after in zip(old, new, strict=True) if before[0].endswith("jpg"))
    counts = Counter(metadata["caption_source"] for metadata in told.values())
    assert min(counts.values()) > 10
    notes = run.receipt()["notes"]
    assert notes["captions"] == dict(sorted(counts.items()))
    assert "captions_lacking" not in notes and "captions_of_other_pictures" not in notes
    assert f"captions: {', '.join(f'{count} {name}' for name, count in counts.most_common())}" in run.log
    assert run.receipt()["inputs"][1]["path"] == "0.jsonl"


def test_again_with_the_same_and_with_other_options(run: Mixing) -> None:
    assert run() == 0
    first = run.result()
    assert run() == 0 and "1 were done before" in run.log
    for flags in (["--seed", "1"], ["--mix", "0.4:web,0.6:synthetic"]):
        assert run(*flags) == 2 and "with other options" in run.log
    assert run("--rerun", "--seed", "1") == 0
    assert run.result() != first
    assert run("--rerun", "--seed", "0") == 0
    assert run.result() == first
    assert status(run) == {"done": 1, "stale": {}}
    put_rows(run, [row(key, caption=f"other {key}") for key in KEYS])  # other captions make it pending again
    assert status(run) == {"done": 0, "stale": {"inputs": 1}}, "status knows it too"
    assert run("--seed", "0") == 0
    assert status(run) == {"done": 1, "stale": {}}
    assert {metadata["caption_choices"]["synthetic"] for metadata in run.told().values()} == {
        f"other {key}" for key in KEYS
    }


def test_without_the_flag_the_options_and_the_bytes_are_what_they_were(run: Mixing) -> None:
    plain = Regroup.arguments(run)
    assert run.script.main([*plain, "--index"]) == 0
    assert run.result() == (run.root / "shards/0.tar").read_bytes()
    options = run.json("hybrid/_receipts/04_reshard/_epoch.1.json")["options"]
    assert not options.keys() & {"mix", "captions", "seed"}
    assert run("--index") == 2 and "with other options" in run.log, "shards of one folder are all made alike"


def test_several_names_and_one_of_weight_nought(run: Mixing) -> None:
    rows = [
        row(key, captions={"short": f"s {key}", "long": f"l {key}", "tags": f"t {key}"}, captioned_as="short")
        for key in KEYS
    ]
    put_rows(run, rows)
    assert run("--mix", "0.3:web,0.4:short,0.3:long,0:tags", "--verify") == 0, run.log
    told = run.told()
    assert {one["caption_source"] for one in told.values()} == {"web", "short", "long"}
    assert told["001"]["caption_choices"] == {
        "web": "web 001", "prompt": "", "short": "s 001", "long": "l 001", "tags": "t 001"
    }  # fmt: skip
    assert run("--rerun", "--mix", "1:shrt") == 1
    assert "no row has a caption named shrt, which --mix names (there are long, short, synthetic, tags)" in run.log
    assert run("--rerun", "--mix", "1:synthetic") == 0  # the first one of several
    assert set(run.receipt()["notes"]["captions"]) == {"synthetic"}


def test_a_sample_without_the_chosen_caption_gets_the_other_one_and_is_counted(run: Mixing) -> None:
    write_shard(
        run.root / "shards/0.tar",
        {
            key: parts(key, caption="" if key < "010" else f"web {key}") | ({"txt": b" "} if key < "010" else {})
            for key in KEYS
        },
    )
    put_rows(
        run, [row(key, caption=None if key == "012" else f"seen {key}") for key in KEYS if not "020" <= key < "030"]
    )
    assert run("--verify") == 0, run.log
    told, mix = run.told(), Mix.parse(HALF)
    full = {"web": "x", "synthetic": "x"}
    assert all(told[key]["caption_source"] == "synthetic" for key in KEYS[:10])
    assert all(told[key]["caption_source"] == "web" for key in ["012", *KEYS[20:30]])
    assert told["025"]["caption_choices"]["synthetic"] == ""
    lacking = Counter[str]()
    for key in KEYS:
        wanted = mix.choose(key, full)[0]
        lacking[wanted] += wanted != told[key]["caption_source"]
    assert min(lacking.values()) > 1
    assert run.receipt()["notes"]["captions_lacking"] == dict(sorted(lacking.items()))
    of_these = ", ".join(f"{name}: {count}" for name, count in lacking.most_common())
    assert f"{lacking.total()} lack the caption that was chosen ({of_these}) and have another" in run.log


def test_a_row_is_found_by_key_or_uid_and_never_taken_from_another_sample(run: Mixing) -> None:
    rows = [
        row("000", key="renamed"),  # by uid
        row("001", uid=None),  # by key
        row("002", uid="f" * 32),  # the key of another sample
        row("003"), row("003", caption="the second of this key"),
        row("004", sha256="0" * 64),  # by the bytes of the picture
        row("005", sha256="0" * 64, image_sha256="0" * 64),  # of another picture
    ]  # fmt: skip
    put_rows(run, rows)
    assert run("--mix", "1:synthetic") == 0, run.log
    told = run.told()
    found = {key: one["caption"] for key, one in told.items() if one["caption_source"] == "synthetic"}
    assert found == {"000": "seen 000", "001": "seen 001", "003": "seen 003", "004": "seen 004"}
    assert run.receipt()["notes"]["captions_of_other_pictures"] == 1
    assert "the captions of 1 are of another picture: not used" in run.log


def test_what_cannot_be_read_or_has_no_caption_stays_as_it_was(run: Mixing) -> None:
    odd = {
        "050": {"jpg": jpeg(50), "json": b"{not json", "txt": b"web"},
        "051": {"jpg": jpeg(51), "json": b"[1]", "txt": b"web"},
        "052": {"jpg": jpeg(52)},  # no caption at all
        "053": {"jpg": jpeg(53), "txt": b"only a txt"},
        "054": {"jpg": jpeg(54), "json": json.dumps({"text": "told as text"}).encode()},
        "056": parts("056", caption="x" * ((1 << 20) + 1)),  # longer than any stage reads
        "055": {"jpg": jpeg(55), "txt.gz": gzip.compress(b"packed")},
    }
    source = write_shard(run.root / "shards/0.tar", {"000": parts("000"), **odd})
    put_rows(run, [row(key) for key in ("000", "050", "051", "056")])
    assert run("--verify", "--mix", "0.5:web,0.5:synthetic") == 0, run.log
    old, new = contents(source), contents(run.result())
    for key in ("050", "051", "052", "056"):
        assert {name: data for name, data in new.items() if name[:3] == key} == {
            name: data for name, data in old.items() if name[:3] == key
        }
    assert json.loads(new["053.json"]) == {
        "caption": "only a txt", "caption_source": "web",
        "caption_choices": {"web": "only a txt", "prompt": "", "synthetic": ""},
    }  # fmt: skip
    assert (new["054.txt"], json.loads(new["054.json"])["text"]) == (b"told as text", "told as text")
    assert new["055.txt"] == b"packed" and "055.txt.gz" not in new, "readers would take the old caption for another"
    assert run.receipt()["notes"]["captions_untouched"] == 4
    assert "4 have no caption or no json that can be read: as they were" in run.log


def test_hostile_captions_are_one_clean_line_and_stay_in_their_field(run: Mixing) -> None:
    nasty = 'a"},"x":1\n\0\u202e{caption}%s </script>\ud800' + "y" * 200_000
    put_rows(run, [row("000", caption=nasty)])
    write_shard(run.root / "shards/0.tar", {"000": parts("000")})
    assert run("--mix", "1:synthetic") == 0, run.log
    metadata = run.told()["000"]
    assert metadata.keys() == {"uid", "caption", "sha256", "exif", "caption_source", "caption_choices"}
    assert metadata["caption"].startswith('a"},"x":1 {caption}%s </script>\ufffdy')
    assert len(metadata["caption"]) <= 1 << 16 and "\n" not in metadata["caption"]


# ---- edited samples


def test_an_edited_sample_keeps_its_prompt_unless_the_captions_are_of_its_new_picture(run: Mixing) -> None:
    put_edits(run, *KEYS[:10])
    assert run("--mix", "0.2:web,0.8:synthetic", "--verify") == 0, run.log
    told = run.told()
    for key in KEYS[:10]:
        assert told[key]["caption_source"] == "prompt" and told[key]["caption"] == f"asked {key}"
        assert told[key]["caption_choices"] == {"web": "", "prompt": f"asked {key}", "synthetic": ""}
        assert told[key]["curation"]["original_caption"] == f"web {key}"
    notes = run.receipt()["notes"]
    assert notes["captions"]["prompt"] == notes["captions_of_other_pictures"] == 10

    new = [
        row(key, sha256=sha256(jpeg(1000 + int(key))), image_sha256=sha256(jpeg(1000 + int(key)))) for key in KEYS[:10]
    ]
    put_rows(run, [*new, *(row(key) for key in KEYS[10:])])  # stage 05 over the hybrid shards
    assert run("--mix", "0.2:web,0.8:synthetic") == 0, run.log
    told = run.told()
    assert {told[key]["caption_source"] for key in KEYS[:10]} == {"prompt", "synthetic"}
    assert "captions_of_other_pictures" not in run.receipt()["notes"]
    captions = {metadata["caption"] for key, metadata in told.items() if key < "010"}
    assert not any(caption.startswith("web") for caption in captions), (
        "the photo that it describes is not there any more"
    )


@pytest.mark.parametrize("of", ["the hybrid shard", "the edits"])
def test_an_edit_that_is_encoded_again_is_the_same_picture(of: str, run: Mixing) -> None:
    write_shard(run.root / "shards/0.tar", {"000": {"png": noise(1), "json": parts("000")["json"], "txt": b"web 000"}})
    put_edits(run, "000")
    put_rows(run, [row("000", sha256=None, image_sha256=None)])
    assert run("--mix", "1:synthetic") == 0, run.log
    new, edit = samples_of(run.result())["000"], samples_of(run.root / "edits/0.tar")["000"]
    assert new["png"][:4] == b"\x89PNG" and json.loads(new["json"])["caption_source"] == "prompt"
    seen = sha256(new["png"] if of == "the hybrid shard" else edit["jpg"])
    put_rows(run, [row("000", sha256=seen, image_sha256=seen)])
    assert run("--mix", "1:synthetic", "--verify") == 0, run.log
    assert run.told()["000"]["caption"] == "seen 000"


def test_a_photo_does_not_get_the_caption_of_the_picture_that_stood_in_its_place(run: Mixing) -> None:
    """Stage 05 ran over hybrid shards; now the sample is no edit any more, as when a check rejects it."""
    other = sha256(jpeg(1000))
    put_rows(run, [row("000", sha256=other, image_sha256=other), *(row(key) for key in KEYS[1:])])
    assert run("--mix", "1:synthetic") == 0, run.log
    assert run.told()["000"]["caption_source"] == "web"
    assert run.receipt()["notes"]["captions_of_other_pictures"] == 1


def test_the_edit_of_another_program_is_told_by_its_bytes(run: Mixing) -> None:
    before = json.loads(parts("000")["json"])  # its sha256 is still that of the photo
    edit = {"jpg": jpeg(1000), "txt": b"asked", "json": json.dumps(before | {"caption": "asked"}).encode()}
    write_shard(run.root / "edits/0.tar", {"000": edit})
    assert run("--mix", "1:synthetic") == 0, run.log
    assert run.told()["000"]["caption_source"] == "prompt"
    put_rows(run, [row("000", image_sha256=sha256(jpeg(1000)))])
    assert run("--mix", "1:synthetic") == 0, run.log
    assert run.told()["000"]["caption_source"] == "synthetic"


def test_a_generated_picture_of_the_source_gets_no_caption_without_a_digest(run: Mixing) -> None:
    told = {"caption": "asked", "curation": {"original_caption": "web 000", "prompt": "asked"}}
    write_shard(run.root / "shards/0.tar", {"000": parts("000", **told), "001": parts("001")})
    lines = [json.dumps(row(key, sha256=None, image_sha256=None, tar_file="0.tar")) + "\n" for key in ("000", "001")]
    run.put("theirs.jsonl", "".join(lines))
    assert run("--captions", f"{run.root}/theirs.jsonl", "--mix", "1:synthetic") == 0, run.log
    assert {key: one["caption"] for key, one in run.told().items()} == {"000": "asked", "001": "seen 001"}


def test_a_mixed_shard_can_be_mixed_again_from_the_captions_of_the_web(run: Mixing) -> None:
    put_edits(run, "000")
    assert run("--mix", "1:synthetic") == 0
    plain = run.told()
    assert run("--input", f"{run.root}/hybrid", "--output", f"{run.root}/again", "--mix", "1:web,0:synthetic",
               "--edits", f"{run.root}/hybrid2") == 2  # fmt: skip
    arguments = [
        "--input",
        f"{run.root}/hybrid",
        "--output",
        f"{run.root}/again",
        "--captions",
        f"{run.root}/recaptions",
    ]
    assert run.script.main([*arguments, "--mix", "1:web,0:synthetic"]) == 0
    for key, metadata in ((k, json.loads(m["json"])) for k, m in samples_of(run.root / "again/0.tar").items()):
        assert metadata["caption"] == (f"asked {key}" if key == "000" else f"web {key}")
        assert metadata["caption_choices"] == plain[key]["caption_choices"]


def test_what_counts_as_a_samples_own_caption() -> None:
    assert own_caption({"caption": " a\nb "}, None, edited=False) == ("web", "a b")
    assert own_caption({}, b"txt", edited=False) == ("web", "txt")
    assert own_caption({"caption": "c", "curation": {"prompt": "c"}}, None, edited=False) == ("prompt", "c")
    tar_of_05 = {"caption": "seen", "curation": {"original_caption": "web", "recaptioned_by": {"name": "m"}}}
    assert own_caption(tar_of_05, b"seen", edited=False) == ("web", "web")
    tar_of_05["curation"] |= {"previous": {"prompt": "web"}}  # type: ignore[operator]
    assert own_caption(tar_of_05, b"seen", edited=False) == ("prompt", "web")
    mixed = {"caption": "s", "caption_source": "short", "caption_choices": {"web": "w", "prompt": "", "short": "s"}}
    assert own_caption(mixed, b"s", edited=False) == ("web", "w")
    assert own_caption(mixed | {"caption": "asked"}, b"asked", edited=True) == ("prompt", "asked")
    assert own_caption({"caption": 7, "curation": "x", "caption_choices": 1}, None, edited=False) == ("web", "")


# ---- nothing is silent


def test_captions_of_nothing_are_refused(run: Mixing) -> None:
    for path in ("recaptions/rows/0.jsonl",):
        (run.root / path).unlink()
    assert run() == 2 and "is empty: run stage 05 first" in run.log
    assert run("--captions", f"{run.root}/nowhere") == 2 and "no captions there" in run.log
    put_rows(run, [row("000")], shard="7")
    assert run() == 1, "the shard has no rows"
    assert "stage 05 first" in run.log and "0.jsonl" in run.log
    put_rows(run, [row("000", key="x", uid="f" * 32)])
    assert run() == 1
    assert "no caption there is of a sample of this shard" in run.log
    put_rows(run, [])
    assert run("--retry_failed") == 1
    assert "no caption there is of a sample of this shard" in run.log
    put_rows(run, [row("000"), {"key": "001"}])
    with open(run.root / "recaptions/rows/0.jsonl", "ab") as file:
        file.write(b"{cut off")
    assert run("--retry_failed") == 1
    assert "0.jsonl, line 3: not a row" in run.log


def test_the_folder_of_another_stage_is_refused(run: Mixing) -> None:
    run.put("captions/0.json", "{}")
    run.put("captions/_receipts/01_filter_noface/_epoch.1.json", "{}")
    assert run("--captions", f"{run.root}/captions") == 2
    assert "--captions" in run.log and "holds the files of 01_filter_noface" in run.log


# ---- captions of other tools


def test_tables_of_other_tools(run: Mixing) -> None:
    theirs = [
        {"key": key, "caption": f"theirs {key}", "original_caption": f"web {key}", "tar_file": "0.tar",
         "uid": uid(int(key)), "url": None, "width": 1, "height": 1, "caption_short": f"short {key}"}
        for key in KEYS[:30]
    ]  # fmt: skip
    lines = "".join(json.dumps(one) + "\n" for one in theirs)
    put_edits(run, "000")
    run.put("theirs/captions.jsonl", lines)
    flags = ["--captions", f"{run.root}/theirs", "--mix", "0.5:synthetic,0.5:short"]
    assert run(*flags, "--verify") == 0, run.log
    told = run.told()
    assert {one["caption_source"] for key, one in told.items() if key < "030"} == {"synthetic", "short", "prompt"}
    assert told["000"]["caption_source"] == "prompt", "nothing says that the caption is of the new picture"
    assert told["001"]["caption_choices"] == {
        "web": "web 001",
        "prompt": "",
        "synthetic": "theirs 001",
        "short": "short 001",
    }
    assert told["035"]["caption_source"] == "web"
    assert run(*flags, "--rerun", "--mix", "1:long") == 2
    assert "no row has a caption named long" in run.log
    columns = {"key": KEYS, "original_caption": KEYS, "vlm_caption": [f"vlm {key}" for key in KEYS]}
    run.put("contra/.keep", "")
    pq.write_table(pa.table(columns), run.root / "contra/all_captions.parquet")
    assert run("--captions", f"{run.root}/contra/all_captions.parquet", "--rerun", "--mix", "1:synthetic") == 0, run.log
    assert run.told()["035"]["caption"] == "vlm 035"
    pq.write_table(
        pa.table(columns | {"vlm_caption": [f"now {key}" for key in KEYS]}), run.root / "contra/all_captions.parquet"
    )
    assert run("--captions", f"{run.root}/contra/all_captions.parquet", "--mix", "1:synthetic") == 0, run.log
    assert run.told()["035"]["caption"] == "now 035", "other captions make the shard pending again"


def test_of_many_tables_a_shard_takes_the_one_of_its_name(run: Mixing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.reshard.captions._MOST_FILES", 1)
    for shard in "01":
        lines = "".join(json.dumps(row(key, tar_file=f"{shard}.tar", uid=None)) + "\n" for key in KEYS)
        run.put(f"theirs/{shard}.jsonl", lines)
    flags = ["--captions", f"{run.root}/theirs", "--mix", "1:synthetic"]
    assert run(*flags) == 0, run.log
    assert [one["path"] for one in run.receipt()["inputs"]].count("0.jsonl") == 1
    assert not any(one["path"] == "1.jsonl" for one in run.receipt()["inputs"])
    (run.root / "shards/0.tar").rename(run.root / "shards/5.tar")
    assert run(*flags) == 2 and "none is called after the shard 5" in run.log


# ---- captions that stage 05 made, with its receipts


def test_rows_of_stage_05_count_by_its_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edits").mkdir()
    run = Mixing(tmp_path, capsys)
    for shard in ("00000000", "00000004"):
        run.put(f"shards/{shard}.tar", (EXAMPLES / f"{shard}.tar").read_bytes())
    caption = [
        "--input",
        f"{tmp_path}/shards",
        "--output",
        f"{tmp_path}/recaptions",
        "--batch_size",
        "4",
        "--device",
        "cpu",
    ]
    assert stub.main([*caption, "--quiet", "--shards", "00000000"]) == 0
    assert run("--index") == 1
    assert "00000004" in run.log and "stage 05 first: 05_recaption has no receipt for it yet" in run.log
    assert stub.main([*caption, "--quiet"]) == 0
    assert run("--index", "--verify") == 0, run.log
    receipt = run.receipt("00000004")
    assert receipt["inputs"][1]["path"] == "00000004.jsonl" and "digest" in receipt["inputs"][1]
    assert receipt["sources"][1] == {"stage": "05_recaption", "folder": "../recaptions", "below": "rows"}
    told = run.told("00000000") | run.told("00000004")
    rows = {one["key"]: one for path in (tmp_path / "recaptions/rows").glob("*.jsonl") for one in read_jsonl(path)}
    assert {one["caption_source"] for one in told.values()} == {"web", "synthetic"}
    for key, metadata in told.items():
        assert metadata["caption_choices"]["synthetic"] == (rows[key]["caption"] if key in rows else "")
    code, out = verify(run)
    assert code == 0, out
    assert status(run) == {"done": 2, "stale": {}}
    counts = Counter(one["caption_source"] for one in told.values())
    assert main(["status", str(tmp_path)]) == 0
    assert f"captions: {', '.join(f'{n} {name}' for name, n in counts.most_common())}" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--output", f"{tmp_path}/report.html", "--quiet"]) == 0
    page = (tmp_path / "report.html").read_text()
    for name, count in counts.items():
        assert f'<th scope="row">{name}</th><td class="soft">caption</td><td class="n">{count}</td>' in page
    assert stub.main([*caption, "--quiet", "--rerun", "--prompt", "Say it otherwise", "--shards", "00000004"]) == 0
    assert status(run) == {"done": 1, "stale": {"inputs": 1}}
    code, out = verify(run)
    assert code == 1 and "stale" in out
    assert run("--index") == 0, run.log
    assert "1 were done before" in run.log
    assert verify(run)[0] == 0
    for place in ("rows", "captions.jsonl"):  # what lies in the folder means the folder
        assert run("--index", "--captions", f"{tmp_path}/recaptions/{place}") == 0
        assert "2 were done before" in run.log
    (tmp_path / "recaptions/rows/00000000.jsonl").write_bytes(b"{}\n")
    (tmp_path / "hybrid/_receipts/04_reshard/00000/00000000.json").unlink()
    assert run("--index", "--overwrite") == 1
    assert "differs from the file that 05_recaption published" in run.log


def status(run: Mixing) -> dict[str, Any]:
    run.capsys.readouterr()
    main(["status", str(run.root), "--json"])
    told = json.loads(run.capsys.readouterr().out)
    stage = next(stage for stage in told["stages"] if stage["stage"] == "04_reshard")
    return {"done": stage["done"], "stale": stage["stale"]}


# ---- with the other options


def test_a_subset_copies_and_datacomps_keys(run: Mixing) -> None:
    assert run("--subset", put_subset(run, [1, 3, 3, 8]), "--keys", "datacomp", "--verify") == 0, run.log
    told, mix = run.told(), Mix.parse(HALF)
    assert len(told) == 4
    for key, metadata in told.items():
        number = next(n for n in range(40) if uid(n) == key.partition("-")[0])
        assert metadata["caption_source"] == mix.choose(KEYS[number], {"web": "x", "synthetic": "x"})[1]
        assert metadata["caption_choices"]["synthetic"] == f"seen {KEYS[number]}"
    assert sum(run.receipt()["notes"]["captions"].values()) == 3, "each sample counts once"


def test_regrouped_shuffled_and_spread_each_sample_has_the_caption_it_has_without(run: Mixing) -> None:
    write_shard(run.root / "shards/1.tar", {f"1{key}": parts(f"1{key}") for key in KEYS})
    put_rows(run, [row(f"1{key}") for key in KEYS], shard="1")
    put_edits(run, "003")
    assert run() == 0, run.log
    plain = run.told("0") | run.told("1")
    numbers = [*range(40), *range(1000, 1040)]
    subset = put_subset(run, [*numbers, *numbers[::5]])
    flags = ["--shard_size", "16", "--shuffle_buffer", "50", "--subset", subset, "--spread_copies", "--verify"]
    assert run(*flags, "--output", f"{run.root}/regrouped") == 0, run.log
    seen = Counter[str]()
    for path in sorted((run.root / "regrouped").glob("*.tar")):
        for key, members in samples_of(path).items():
            of = key.partition("-")[0]
            seen[of] += 1
            assert json.loads(members["json"]) == plain[of] and members["txt"].decode() == plain[of]["caption"]
    assert seen == {key: 1 + (number % 5 == 0) for number, key in enumerate(plain)}
    notes = [
        json.loads(p.read_bytes())["notes"] for p in (run.root / "regrouped").glob("_receipts/04_reshard/*/[!_]*.json")
    ]
    assert sum(note["captions"].get("prompt", 0) for note in notes) == 1
    put_rows(run, [row(key, key="x", uid=None) for key in KEYS])
    assert run(*flags, "--output", f"{run.root}/regrouped") == 1
    assert "no caption there is of a sample of this shard" in run.log


def test_blurred_samples_get_their_captions_too(run: Mixing) -> None:
    pytest.importorskip("cv2")
    boxes = [[0.1, 0.1, 0.6, 0.6]]
    shard = {key: parts(key, face_bboxes=boxes if key < "020" else []) for key in KEYS}
    write_shard(run.root / "shards/0.tar", shard)
    assert run("--blur_faces", "recorded", "--verify") == 0, run.log
    told, mix = run.told(), Mix.parse(HALF)
    for key, metadata in told.items():
        assert ("curation" in metadata) == (key < "020")
        assert metadata["caption_source"] == mix.choose(key, {"web": "x", "synthetic": "x"})[1]
    assert run.receipt()["notes"]["blurred_samples"] == 20
    # Captions of the blurred pictures, as stage 05 gives them over the hybrid shards
    blurred = [row(key, sha256=told[key]["sha256"], image_sha256=told[key]["sha256"]) for key in KEYS]
    put_rows(run, blurred)
    assert run("--blur_faces", "recorded") == 0, run.log
    assert "captions_of_other_pictures" not in run.receipt()["notes"]


def test_capitals_in_the_names_of_members_stay(run: Mixing) -> None:
    source = [member("000.JPG", jpeg(0)), member("000.JSON", parts("000")["json"]), member("000.TXT", b"web 000")]
    run.put("shards/0.tar", tar_of(source))
    for flags in ([], ["--image_suffix", "keep"]):
        assert run("--mix", "1:synthetic", "--rerun", "--verify", *flags) == 0, run.log
        assert [name for name, _ in raw_members(run.result())] == ["000.JPG", "000.JSON", "000.TXT"]
        assert contents(run.result())["000.TXT"] == b"seen 000"


# ---- verify


def verify(run: Mixing, *more: str) -> tuple[int, str]:
    run.capsys.readouterr()
    code = main(
        ["verify", f"{run.root}/shards", f"{run.root}/hybrid", "--quiet", "--workers", "1", "--no_provenance", *more]
    )
    return code, run.capsys.readouterr().out


def changed(run: Mixing, name: str, old: bytes, new: bytes) -> None:
    """Put a fault of the same length into a member of the hybrid shard."""
    path, offset = run.root / "hybrid/0.tar", 0
    with tarfile.open(path) as tar:
        offset = tar.getmember(name).offset_data
        size = tar.getmember(name).size
    data = bytearray(path.read_bytes())
    member = bytes(data[offset : offset + size])
    assert old in member and len(old) == len(new)
    data[offset : offset + size] = member.replace(old, new)
    path.write_bytes(data)


def test_verify_computes_each_choice_again(run: Mixing) -> None:
    put_edits(run, "000", "001")
    assert run() == 0, run.log
    code, out = verify(run)
    assert code == 0, out
    assert out.startswith("OK: 1 shards, 40 samples, 2 of them edited")
    told = run.told()
    web = next(key for key in KEYS[2:] if told[key]["caption_source"] == "web")
    changed(run, f"{web}.txt", f"web {web}".encode(), f"seen {web}".encode()[-7:])
    code, out = verify(run)
    assert code == 1 and f"wrong_caption: {web}: {web}.txt is not what --mix and the captions give" in out, out


def test_verify_finds_a_caption_file_that_changed_and_counts_that_are_wrong(run: Mixing) -> None:
    assert run.script.main([a for a in run.arguments() if a not in ("--edits", f"{run.root}/edits")]) == 0
    code, out = verify(run)
    counts = Counter(one["caption_source"] for one in run.told().values())
    assert code == 0 and out.startswith("OK: 1 shards"), "without edits too"
    assert f"captions: {', '.join(f'{n} {name}' for name, n in counts.most_common())}" in out
    path = next((run.root / "hybrid/_receipts/04_reshard").glob("*/0.json"))
    receipt = json.loads(path.read_bytes())
    receipt["notes"]["captions"]["web"] += 1
    path.write_text(json.dumps(receipt))
    code, out = verify(run)
    assert code == 1 and "samples with the caption web" in out
    receipt["notes"]["captions"]["web"] -= 1
    path.write_text(json.dumps(receipt))
    put_rows(run, [row(key, caption=f"SEEN {key}") for key in KEYS])
    code, out = verify(run)
    assert code == 1 and "wrong_caption" in out
    put_rows(run, [row(key) for key in KEYS])
    (run.root / "recaptions").rename(run.root / "elsewhere")
    code, out = verify(run)
    assert code == 2
    assert verify(run, "--recaptions", f"{run.root}/elsewhere")[0] == 0


def test_verify_of_captions_of_another_tool(run: Mixing) -> None:
    lines = "".join(json.dumps(row(key, tar_file="0.tar")) + "\n" for key in KEYS)
    run.put("theirs.jsonl", lines)
    assert run("--captions", f"{run.root}/theirs.jsonl") == 0, run.log
    shutil.rmtree(run.root / "hybrid/_adopted")
    assert verify(run)[0] == 2
    assert verify(run, "--recaptions", f"{run.root}/theirs.jsonl")[0] == 0
    assert not (run.root / "hybrid/_adopted").exists(), "verify writes nothing there"


# ---- the rows of a shard


def test_rows_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    lengths = [10, 9_000, 60_000, 8_192, 1]  # about the blocks in which a line is read
    lines = [json.dumps(row(f"{n:03d}", caption="c" * lengths[n % 5] + str(n))) for n in range(50)]
    path.write_text("\n".join(lines))  # the last one without a newline
    rows = RowFile(path, ["synthetic"])
    assert rows.count == 50
    for number in range(50):
        for key, told in ((f"{number:03d}", {}), ("other", {"uid": uid(number)})):
            found = rows.find(key, told)
            assert found is not None and found.texts["synthetic"].endswith(f"c{number}"[-len(str(number)) - 1 :])
    assert rows.find("999", {"uid": uid(999)}) is None
    assert rows.find("000", {"uid": uid(1)}) is not None, "the uid leads to the other row"
    rows.close()


def test_the_memory_for_rows_is_a_few_bytes_of_each(tmp_path: Path) -> None:
    count, path = 3000, tmp_path / "0.jsonl"
    path.write_text("".join(json.dumps({"key": f"{n:09}", "uid": uid(n), "caption": "x"}) + "\n" for n in range(count)))
    RowFile(path, ("synthetic",)).close()
    tracemalloc.start()
    rows = RowFile(path, ("synthetic",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = [rows.find(f"{n:09}", {}) for n in (0, 1500, count - 1)] + [rows.find("other", {"uid": uid(7)})]
    rows.close()
    assert all(one is not None for one in found)
    assert peak < 150 * count, f"{peak / count:.0f} bytes a row"


def test_wrong_weights_are_told_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="add up to 1"):
        Mix.parse("0.1:web,0.1:synthetic")
