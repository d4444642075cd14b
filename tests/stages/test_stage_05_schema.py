"""Stage 05 with --schema: answers as JSON from model servers, through the real script."""

from __future__ import annotations

import copy
import importlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import ROOT
from tests.servers import ollama_stub
from tests.stages.harness import Records, read_jsonl
from tests.stages.test_stage_05_models import keys, requests_of

pytest.importorskip("jsonschema")

SHARD = ROOT / "examples" / "shards" / "00000003.tar"
NAME = "05_recaption"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "maxLength": 80},
        "people": {"type": "integer", "minimum": 0, "maximum": 9},
        "light": {"enum": ["day", "night"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 2},
        "place": {"type": "object", "properties": {"indoors": {"type": "boolean"}}, "required": ["indoors"]},
    },
    "required": ["description", "people", "light", "tags", "place"],
}
records = Records(NAME)

pytestmark = pytest.mark.usefixtures("stage_in_process")


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return file


def run(out: Path, *flags: object) -> int:
    stage = importlib.import_module(NAME)
    return int(stage.main([*map(str, [SHARD, *flags]), "-o", str(out), "--device", "cpu", "--quiet"]))


def test_the_schema_of_the_examples_is_the_one_that_the_page_shows(tmp_path: Path) -> None:
    example = ROOT / "examples" / "scene.json"
    page = (ROOT / "docs" / "stage-05.md").read_text("utf-8")
    assert f"This is `examples/scene.json`:\n\n```json\n{example.read_text('utf-8')}```" in page
    with ollama_stub() as port:
        assert run(tmp_path, *asking(port), "--schema", example, "--dry_run") == 0


def asking(port: int) -> list[object]:
    return ["--model", "endpoint:tulu3:fairclip", "--ports", port]


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_answers_become_columns_in_every_format(api: str, schema: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "requests.jsonl"
    with ollama_stub(api=api, log=log) as port:
        assert run(out, *asking(port), "--schema", schema, "--format", "all") == 0
    sent = {**copy.deepcopy(SCHEMA), "additionalProperties": False}
    sent["properties"] = {
        **SCHEMA["properties"],
        "place": {**SCHEMA["properties"]["place"], "additionalProperties": False},
    }  # type: ignore[dict-item]
    for body in requests_of(log):
        if api == "ollama":
            assert body["format"] == sent and body["options"]["num_predict"] == 512
        else:
            form = {"name": "answer", "strict": True, "schema": sent}
            assert body["response_format"] == {"type": "json_schema", "json_schema": form} and body["max_tokens"] == 512
        assert json.dumps(sent, separators=(",", ":")) in json.dumps(body).replace("\\", "").replace(
            '": ', '":'
        ).replace(", ", ",")
    lines, table = read_jsonl(out / "captions.jsonl"), pq.read_table(out / "all_captions.parquet").to_pylist()
    assert [line["key"] for line in lines] == keys()
    with tarfile.open(out / "shards" / SHARD.name) as tar:
        told = {m.name.removesuffix(".json"): json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")}  # type: ignore[arg-type]
    files = {json.loads(path.read_bytes())["key"]: json.loads(path.read_bytes()) for path in out.glob("files/*/*.json")}
    for line, row in zip(lines, table, strict=True):
        caption = line["caption"]
        assert caption.startswith("A picture, ") and list(line)[8:] == [
            "vlm_people", "vlm_light", "vlm_tags", "vlm_place.indoors",
        ]  # fmt: skip
        assert (line["vlm_people"], line["vlm_light"], line["vlm_place.indoors"]) == (3, "day", True)
        assert row["vlm_caption"] == caption and row["vlm_tags"] == line["vlm_tags"] == [caption, caption]
        assert (row["vlm_people"], row["vlm_place.indoors"]) == (3, True) and "vlm_description" not in row
        answer = {
            "description": caption,
            "people": 3,
            "light": "day",
            "tags": [caption] * 2,
            "place": {"indoors": True},
        }
        assert told[line["key"]]["caption"] == caption and told[line["key"]]["curation"]["answer"] == answer
        assert files[line["key"]]["answer"] == answer


def test_an_answer_that_does_not_fit_is_asked_for_again_with_another_seed(schema: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "requests.jsonl"
    with ollama_stub(api="openai", log=log, says=json.dumps(['{"people": 1}', "A bench."])) as port:
        assert run(out, *asking(port), "--schema", schema) == 0
    bodies = requests_of(log)
    assert len(bodies) == 3 * len(keys()) and len({body["seed"] for body in bodies}) == len(bodies)
    assert sorted({body["temperature"] for body in bodies}) == [0.0, 0.4, 0.8]
    assert {row["vlm_people"] for row in read_jsonl(out / "captions.jsonl")} == {3}


def test_an_answer_that_never_fits_fails_with_the_place(schema: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "requests.jsonl"
    bad = json.dumps({"description": "A bench.", "people": 99, "light": "day", "tags": [], "place": {"indoors": True}})
    with ollama_stub(api="openai", log=log, says=json.dumps([bad] * 9)) as port:
        assert run(out, *asking(port), "--schema", schema) == 1
    receipt = records.receipt(out, SHARD.stem)
    assert receipt["counts"]["failed"] == {"schema_mismatch": len(keys())}
    assert len(requests_of(log)) == 3 * len(keys())


def test_answers_are_taken_over_and_another_schema_is_another_option(
    schema: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "requests.jsonl"
    with ollama_stub(api="openai", log=log) as port:
        flags = [*asking(port), "--schema", schema]
        assert run(out, *flags) == 0
        first = (out / "captions.jsonl").read_bytes()
        assert run(out, *flags, "--format", "jsonl,parquet", "--rerun") == 0
        assert len(requests_of(log)) == len(keys()) and (out / "captions.jsonl").read_bytes() == first
        assert pq.read_table(out / "all_captions.parquet")["vlm_people"].to_pylist() == [3] * len(keys())
        schema.write_text(json.dumps({**SCHEMA, "title": "Another"}))
        assert run(out, *flags, "--format", "jsonl,parquet") == 2
        assert "schema" in capsys.readouterr().err
        assert run(out, *flags, "--rerun") == 0
        assert len(requests_of(log)) == 2 * len(keys())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "florence2-base"], "--schema: only model servers decode by a schema: give --model endpoint:"),
        (["--model", "endpoint:m", "--adopt", "x.jsonl"], "no answers of --schema"),
        (
            ["--model", "endpoint:m", "--schema_caption", "people"],
            "error: --schema_caption people: the schema's texts are description",
        ),
    ],
)
def test_what_a_schema_does_not_go_with(
    flags: list[str], says: str, schema: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *flags, "--schema", schema) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_caption_of_no_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--model", "endpoint:m", "--schema_caption", "alt") == 2
    assert "--schema_caption needs --schema" in capsys.readouterr().err


def test_a_server_that_refuses_schemas_is_not_asked_without(
    schema: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ollama_stub(api="openai", refuses="response_format") as port:
        assert run(tmp_path / "out", *asking(port), "--schema", schema) == 2
    assert "Unknown argument: response_format" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server_decodes_by_the_schema(llama_server: str, schema: Path, tmp_path: Path) -> None:
    """llama.cpp's: a model that is shown noise writes an object of the schema all the same."""
    says = ["A person reads.", "A bench stands."]
    small = {"caption": {"enum": says}, "people": {"type": "integer", "minimum": 2, "maximum": 9}}
    schema.write_text(json.dumps({"type": "object", "properties": small, "required": [*small]}))
    flags = ["--model", "endpoint:tiny-vision", "--endpoints", llama_server, "--timeout", 120, "--max_images", 1]
    assert run(tmp_path / "out", *flags, "--schema", schema, "--prompt", "What?") == 0
    assert records.receipt(tmp_path / "out", SHARD.stem)["counts"] == {"in": 1, "kept": 1, "dropped": {}, "failed": {}}
    (row,) = read_jsonl(tmp_path / "out" / "captions.jsonl")
    assert row["caption"] in says and 2 <= row["vlm_people"] <= 9
