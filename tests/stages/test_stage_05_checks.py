"""Stage 05 with --check: captions are compared with their pictures, through the real script and a real CLIP."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.__main__ import main as command
from curation.images import decode_rgb
from curation.tar.samples import image_of, read_samples
from tests import EXAMPLES, ROOT
from tests.processes import ended_at_last, wait_until
from tests.servers import ollama_stub
from tests.stages import test_stage_05_recaption as plain
from tests.stages.harness import Records, hashes, read_jsonl
from tests.stages.test_stage_05_models import requests_of

SHARD = ROOT / "examples" / "shards" / "00000003.tar"
NAME = "05_recaption"
GOOD, BAD, OTHER = "A photo with a bench.", "Nothing of it is here.", "What the last one shows."
IMAGES = 4
records = Records(NAME)

pytestmark = pytest.mark.usefixtures("stage_in_process")


def run(out: Path, *flags: object) -> int:
    stage = importlib.import_module(NAME)
    given = [SHARD, "--max_images", IMAGES, *flags]
    return int(stage.main([*map(str, given), "-o", str(out), "--device", "cpu", "--quiet"]))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP that knows some pictures: all but the last of them show what the good caption says."""
    pytest.importorskip("transformers")
    from tests.backends.tiny_extractors import save_planted_clip

    pictures = [decode_rgb(image_of(sample)) for sample in read_samples(SHARD) if sample.image_suffix][:IMAGES]
    shown = [(picture, [GOOD]) for picture in pictures[:-1]] + [(pictures[-1], [OTHER])]
    shown.append((255 - pictures[0], [BAD]))
    return f"clip:{save_planted_clip(tmp_path_factory.mktemp('clip') / 'model', shown, side=64)}"


def checking(planted: str, *flags: object) -> list[object]:
    return ["--check", "caption,repeats", "--check_model", planted, "--min_caption_score", 0.5, *flags]


def test_captions_that_do_not_fit_are_made_again_and_then_rejected(
    planted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "requests.jsonl"
    with ollama_stub(api="openai", log=log, says=json.dumps([BAD, *[GOOD] * 9])) as port:
        asking = ["--model", "endpoint:tulu3:fairclip", "--ports", port, "--format", "jsonl,parquet"]
        assert run(out, *asking, *checking(planted)) == 0
        asked = len(requests_of(log))
        assert asked == 2 * (IMAGES - 1) + 3
        receipt = records.receipt(out, SHARD.stem)
        kept = IMAGES - 1
        assert receipt["counts"] == {"in": IMAGES, "kept": kept, "dropped": {"check_caption": 1}, "failed": {}}
        counts = {"tries": asked, "kept": kept, "failed_tries": asked - kept, "rejected": 1}
        assert receipt["notes"]["checks"] == {**counts, "by_check": {"caption": asked - kept}}
        [line] = records.reject_lines(out, SHARD.stem)
        assert (line["reason"], line["caption"], line["tries"]) == ("check_caption", GOOD, 3)
        assert line["checks"]["caption"]["score"] < 0.1 and line["checks"]["repeats"] == {"share": 0.0}  # type: ignore[index]
        assert records.drops(out, SHARD.stem) == {line["key"]: "check_caption"}
        rows = read_jsonl(out / "rows" / f"{SHARD.stem}.jsonl")
        assert {row["caption"] for row in rows} == {GOOD} and line["key"] not in {row["key"] for row in rows}
        assert all(row["checks"]["caption"]["score"] > 0.9 for row in rows)
        table = pq.read_table(out / "all_captions.parquet")
        assert table["check_caption"].to_pylist() == [row["checks"]["caption"]["score"] for row in rows]
        assert table["check_repeats"].to_pylist() == [0.0] * kept
        first = hashes(out)
        assert run(out, *asking, *checking(planted), "--rerun") == 0, "what passed is taken over"
        assert (
            len(requests_of(log)) == asked + 3
            and hashes(out)[f"rows/{SHARD.stem}.jsonl"] == first[f"rows/{SHARD.stem}.jsonl"]
        )
        assert run(out, *asking, *checking(planted), "--tries", 4) == 2, "another option"
        assert run(out, *asking) == 2
    assert "checks" in capsys.readouterr().err


def test_answers_that_are_there_are_compared_with_their_pictures(planted: str, tmp_path: Path) -> None:
    """Each caption of the stub is the same, and the last picture shows something else."""
    pytest.importorskip("jsonschema")
    log, schema = tmp_path / "requests.jsonl", tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"caption": {"type": "string"}}, "required": ["caption"]}')
    out, made = tmp_path / "out", tmp_path / "made"
    with ollama_stub(api="openai", log=log, says=json.dumps([json.dumps({"caption": GOOD})] * 99)) as port:
        asking = ["--model", "endpoint:tulu3:fairclip", "--ports", port, "--schema", schema]
        assert run(made, *asking, *checking(planted)) == 0
        assert run(out, *asking) == 0
        asked = len(requests_of(log))
        assert run(out, *asking, *checking(planted), "--rerun") == 0
        assert len(requests_of(log)) == asked + 2, "of one image, from two other seeds"
        assert len({body["seed"] for body in requests_of(log)[asked:]} | {None}) == 3
        assert hashes(out) == hashes(made)
        told = {"tries": 6, "kept": 3, "failed_tries": 3, "rejected": 1, "by_check": {"caption": 3}}
        assert [records.receipt(folder, SHARD.stem)["notes"]["checks"] for folder in (out, made)] == [told] * 2
        other = f"{planted}-copy"
        shutil.copytree(planted.removeprefix("clip:"), other.removeprefix("clip:"), dirs_exist_ok=True)
        assert run(out, *asking, *checking(other, "--tries", 1), "--rerun") == 0
        assert len(requests_of(log)) == asked + 3, "of the one that was rejected"
        assert hashes(out)[f"rows/{SHARD.stem}.jsonl"] == hashes(made)[f"rows/{SHARD.stem}.jsonl"]


def test_each_of_several_captions_is_checked(planted: str, tmp_path: Path) -> None:
    """An image is dropped where all of its captions are rejected, and fails where one of them failed otherwise."""
    prompts = tmp_path / "prompts.yaml"
    with ollama_stub(says=json.dumps([GOOD] * 9)) as port:
        flags = ["--model", "endpoint:tulu3:fairclip", "--ports", port, *checking(planted), "--prompt_file", prompts]
        flags += ["--format", "parquet", "--max_error_rate", 1, "--tries", 1]
        prompts.write_text("short: What is it?\nlong: What is all of it?\n")
        assert run(tmp_path / "both", *flags) == 0
        prompts.write_text("short: What is it?\nlong: 'What is it? REFUSE'\n")
        assert run(tmp_path / "one", *flags) == 0
    receipt = records.receipt(tmp_path / "both", SHARD.stem)
    assert receipt["counts"]["dropped"] == {"check_caption": 1} and receipt["notes"]["checks"]["rejected"] == 2
    table = pq.read_table(tmp_path / "both" / "all_captions.parquet")
    for name in ("check_caption", "check_caption_short", "check_caption_long"):
        assert all(score > 0.9 for score in table[name].to_pylist())
    row = read_jsonl(tmp_path / "both" / "rows" / f"{SHARD.stem}.jsonl")[0]
    assert [*row["captions_checks"]] == ["short", "long"] and row["checks"] == row["captions_checks"]["short"]
    counts = records.receipt(tmp_path / "one", SHARD.stem)["counts"]
    assert counts == {"in": IMAGES, "kept": IMAGES - 1, "dropped": {}, "failed": {"reply_refusal": 1}}
    [line] = records.reject_lines(tmp_path / "one", SHARD.stem)
    assert f"short: check_caption the last of 1 captions: {GOOD}" in line["detail"]
    assert {
        row["captions_failed"]["long"] for row in read_jsonl(tmp_path / "one" / "rows" / f"{SHARD.stem}.jsonl")
    } == {"reply_refusal"}


def test_the_last_line_tells_what_came_of_the_checks(
    planted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ollama_stub(says=json.dumps([BAD, *[GOOD] * 9])) as port:
        flags = [
            SHARD,
            "--max_images",
            IMAGES,
            "--model",
            "endpoint:tulu3:fairclip",
            "--ports",
            port,
            *checking(planted),
        ]
        stage = importlib.import_module(NAME)
        assert stage.main([*map(str, flags), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert (
        "3 captioned, 3 of them after a check had failed another caption, 1 rejected by checks" in said.out + said.err
    )


def test_a_kill_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, a batch at a time; every caption is made twice because the first repeats itself."""
    monkeypatch.setenv("CURATION_STUB_REPEATS", "1")
    flags = ["--check", "repeats", "--format", "jsonl,parquet"]
    assert plain.run(EXAMPLES, tmp_path / "whole", *flags) == 0
    with ended_at_last(plain.start(EXAMPLES, tmp_path / "out", *flags, pause_s=0.1)) as victim:
        wait_until(lambda: plain.has_begun(tmp_path / "out"), "work in hand", while_runs=victim)
        time.sleep(0.3)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert plain.run(EXAMPLES, tmp_path / "out", *flags) == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    for receipt in records.receipts(tmp_path / "out").values():
        told = receipt["notes"]["checks"]
        assert told["tries"] == told["kept"] + told["failed_tries"] == 2 * told["kept"] and told["rejected"] == 0


def test_captions_that_repeat_themselves_do_not_fail_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATION_STUB_REPEATS", "9")
    flags = ["--check", "repeats", "--tries", 2, "--max_error_rate", 0]
    assert plain.run(SHARD, tmp_path / "out", *flags) == 0
    counts = records.receipt(tmp_path / "out", SHARD.stem)["counts"]
    assert counts["dropped"] == {"check_repeats": counts["in"]} and not counts["failed"] and not counts["kept"]


def test_models_fetch_gets_the_checks_model(planted: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "endpoint:m", "--check", "caption", "--check_model", planted, "--min_caption_score", "0.5"]
    assert command(["models", "fetch", "05", *flags, "--dry_run"]) == 0
    assert planted.removeprefix("clip:") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--check", "face"], "--check face: checks of captions are caption, repeats"),
        (["--check", "repeats", "--min_caption_score", "0.2"], "--min_caption_score needs --check caption"),
        (["--check", "caption", "--max_repeats", "0.2"], "--max_repeats needs --check repeats"),
        (["--tries", "2"], "--tries needs --check"),
        (
            ["--check", "caption", "--check_model", "no-such", "--min_caption_score", "0.2"],
            "--check_model no-such: no such CLIP model",
        ),
        (["--check", "caption", "--check_model", "siglip:a/b"], "say what passes with --min_caption_score"),
        (["--check", "caption"], "models fetch 05 --check caption"),
    ],
)
def test_what_a_check_needs(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(tmp_path / "out", "--model", "endpoint:m", "--ports", 1, *flags) == 2
    assert says in capsys.readouterr().err
