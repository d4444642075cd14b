"""Where stage 05's models come from: vision servers, the hub, a classifier by URL; each through the real script."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.caption.captioner import CaptionSettings
from curation.serving.registry import OwnRegistration, Registration
from curation.tar.samples import read_samples
from tests import EXAMPLES, ROOT
from tests.processes import started, wait_until
from tests.servers import ollama_stub
from tests.servers.files import file_server
from tests.servers.hub import TOKEN, Model, serve

SHARD = ROOT / "examples" / "shards" / "00000003.tar"
NAME = "05_recaption"


pytestmark = pytest.mark.usefixtures("stage_in_process")


def run(out: Path, *flags: object) -> int:
    stage = importlib.import_module(NAME)
    source = [] if flags and flags[0] == EXAMPLES else [SHARD]
    return int(stage.main([*map(str, [*source, *flags]), "-o", str(out), "--device", "cpu", "--quiet"]))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]


def keys(shard: Path = SHARD) -> list[str]:
    return [sample.key for sample in read_samples(shard) if sample.image_suffix]


# ---- vision servers


def requests_of(log: Path) -> list[dict[str, Any]]:
    whole, _, _ = log.read_text().rpartition("\n")  # the last line may be half written
    return [json.loads(json.loads(line)["body"]) for line in whole.splitlines()]


@pytest.mark.parametrize("flag", ["--ports", "--endpoints"])
def test_every_server_that_is_named_is_asked(flag: str, tmp_path: Path) -> None:
    logs = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    stubs = [{"api": "openai", "slots": 2, "latency_s": 0.05, "log": log} for log in logs]
    with ollama_stub(**stubs[0]) as first, ollama_stub(**stubs[1]) as second:
        places = {"--ports": f"{first},{second}", "--endpoints": f"http://127.0.0.1:{first},http://127.0.0.1:{second}"}
        flags = [
            "--model",
            "endpoint:tulu3:fairclip",
            flag,
            places[flag],
            "--prompt",
            "What is it?",
            "--max_tokens",
            33,
        ]
        assert run(tmp_path / "out", *flags) == 0
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found] == keys()
    assert len({row["caption"] for row in found}) == len(found), "each picture has its own answer"
    for log in logs:
        asked = requests_of(log)
        assert asked and {body["max_tokens"] for body in asked} == {33}
        assert "What is it?" in json.dumps(asked[0])


def test_nothing_waits_for_a_slow_answer(tmp_path: Path) -> None:
    """The server keeps one answer back until it has answered 40 others, which are of four further shards."""
    log = tmp_path / "requests.jsonl"
    with ollama_stub(api="openai", slots=4, holds=9, holds_until=49, log=log) as port:
        flags = [EXAMPLES, "--model", "endpoint:tulu3:fairclip", "--ports", port, "--batch_size", 4]
        assert run(tmp_path / "out", *flags, "--format", "parquet,jsonl") == 0
    asked = [json.dumps(body["messages"]) for body in requests_of(log)]
    assert len(asked) == len({*asked}), "the slow one was not asked again"
    found = [(row["tar_file"], row["key"]) for row in rows(tmp_path / "out")]
    assert found == [(path.name, key) for path in sorted(EXAMPLES.glob("*.tar")) for key in keys(path)]


def test_answers_that_came_before_a_signal_are_asked_for_once(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with ollama_stub(api="openai", slots=4, latency_s=0.15, log=log) as port:
        flags = ["--model", "endpoint:tulu3:fairclip", "--ports", port, "--batch_size", 4, "--quiet"]
        command = [sys.executable, f"{NAME}.py", EXAMPLES, "-o", tmp_path / "out", *flags]
        with started(command) as process:
            wait_until(lambda: log.exists() and len(requests_of(log)) > 12, "some requests", while_runs=process)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(60) == 75
        half = len(requests_of(log))
        assert subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode == 0
    asked = [json.dumps(body["messages"]) for body in requests_of(log)]
    assert half < len(asked) == len({*asked}) == len(rows(tmp_path / "out"))


def test_servers_that_register_in_a_folder_are_asked(tmp_path: Path) -> None:
    with ollama_stub() as port:
        registration = Registration(f"http://127.0.0.1:{port}", "tulu3:fairclip", "ollama", "node1", 7)
        (tmp_path / "servers").mkdir()
        OwnRegistration(tmp_path / "servers", registration).beat()
        flags = ["--model", "endpoint:tulu3:fairclip", "--endpoints_dir", tmp_path / "servers"]
        assert run(tmp_path / "out", *flags) == 0
    assert [row["key"] for row in rows(tmp_path / "out")] == keys()


@pytest.mark.parametrize("api", ["openai", "ollama"])
@pytest.mark.parametrize(
    ("word", "reason", "times"),
    [("REFUSE", "reply_refusal", 3), ("PREAMBLE", "reply_preamble", 3), ("LENGTH", "reply_cut_short", 2)],
)
def test_a_text_of_a_server_that_is_no_caption(word: str, reason: str, times: int, api: str, tmp_path: Path) -> None:
    """It is asked for again, then rejected with the reason, and the run does not end as if all were well."""
    log = tmp_path / "requests.jsonl"
    with ollama_stub(log=log, api=api) as port:
        flags = ["--model", "endpoint:tulu3:fairclip", "--ports", str(port), "--prompt", f"What is this? {word}"]
        assert run(tmp_path / "out", *flags) == 1
    (receipt,) = (tmp_path / "out").glob(f"_receipts/{NAME}/*/*.json")
    record = json.loads(receipt.read_bytes())
    assert record["status"] == "failed" and record["counts"]["failed"] == {reason: len(keys())}
    assert len(requests_of(log)) == times * len(keys())


def test_a_caption_that_stays_cut_ends_with_its_last_whole_sentence(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    with ollama_stub(log=log) as port:
        flags = ["--model", "endpoint:tulu3:fairclip", "--ports", str(port), "--prompt", "What is this? SENTENCES"]
        assert run(tmp_path / "out", *flags) == 0
    assert {row["caption"] for row in rows(tmp_path / "out")} == {"A person in a garden."}
    (receipt,) = (tmp_path / "out").glob(f"_receipts/{NAME}/*/*.json")
    assert json.loads(receipt.read_bytes())["notes"]["cut_to_whole_sentences"] == len(keys())
    tokens = sorted(body["options"]["num_predict"] for body in requests_of(log))
    assert tokens == [120] * len(keys()) + [240] * len(keys())


def test_the_default_prompt_asks_for_no_more_than_fits(tmp_path: Path) -> None:
    asked = []
    for number, flags in enumerate(([], ["--max_words", "9"], ["--max_words", "0"])):
        log = tmp_path / f"requests-{number}.jsonl"
        with ollama_stub(log=log) as port:
            more = ["--model", "endpoint:tulu3:fairclip", "--ports", str(port), *flags]
            assert run(tmp_path / f"out-{number}", *more) == 0
        asked.append({body["messages"][-1]["content"].rpartition("introduction.")[2] for body in requests_of(log)})
    assert asked == [{" Use at most 70 words."}, {" Use at most 9 words."}, {""}]


def test_a_folder_of_an_older_version_goes_on_with_its_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def asked(name: str, *flags: str) -> set[str]:
        log = tmp_path / name
        log.touch()
        with ollama_stub(log=log) as port:
            assert run(out, "--model", "endpoint:tulu3:fairclip", "--ports", port, *flags) == 0
        return {body["messages"][-1]["content"].rpartition("introduction.")[2] for body in requests_of(log)}

    assert asked("first", "--max_words", "0") == {""}
    (record,) = out.glob(f"_receipts/{NAME}/_epoch.1.json")
    epoch = json.loads(record.read_bytes())
    assert epoch["options"].pop("max_words") == 0  # as an older version has recorded it
    assert epoch["options"].pop("gather") == "images"
    assert epoch["options"].pop("attention") == "auto"
    record.write_text(json.dumps(epoch))
    assert asked("all is done") == set()
    (receipt,) = out.glob(f"_receipts/{NAME}/*/*.json")
    receipt.unlink()
    assert asked("again") == {""}
    assert run(out, "--model", "endpoint:tulu3:fairclip", "--ports", 1, "--gather", "images") == 2
    assert re.search("gather: .?tensors", capsys.readouterr().err)
    assert run(out, "--model", "endpoint:tulu3:fairclip", "--ports", 1, "--max_words", "auto") == 2
    assert "max_words: 0" in capsys.readouterr().err
    assert run(out, "--model", "endpoint:tulu3:fairclip", "--ports", 1, "--attention", "auto") == 2
    assert re.search("attention: .?sdpa", capsys.readouterr().err), "what gives the bytes of older versions"
    assert asked("anew", "--rerun") == {" Use at most 70 words."}


def test_a_server_that_is_too_slow_leaves_it_to_the_others(tmp_path: Path) -> None:
    with ollama_stub(api="openai", latency_s=5) as slow, ollama_stub(api="openai") as quick:
        flags = ["--model", "endpoint:tulu3:fairclip", "--ports", f"{slow},{quick}", "--timeout", 0.4]
        assert run(tmp_path, *flags) == 0
    assert [row["key"] for row in rows(tmp_path)] == keys()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ports", "1"], "no endpoint answers"),
        (["--ports", "http"], "--ports: 'http' is not a port"),
        (["--endpoints", "http://127.0.0.1:1", "--endpoints_dir", "x"], "leave --endpoints out"),
        (["--timeout", "0"], "--timeout is more than 0"),
        (["--quantize", "4bit"], "with an endpoint"),
        (["--compile", "decode"], "with an endpoint"),
        (["--attention", "flash"], "with an endpoint"),
    ],
)
def test_flags_of_servers_that_cannot_be(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--model", "endpoint:m", *flags) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_stage_with_a_real_vision_server(llama_server: str, tmp_path: Path) -> None:
    """llama.cpp's: a real language model that is shown each picture by a small encoder with random weights."""
    flags = ["--model", "endpoint:tiny-vision", "--endpoints", llama_server, "--max_tokens", 3, "--timeout", 60]
    assert run(tmp_path / "out", *flags, "--smoke", 3, "--max_error_rate", 1) == 0
    (receipt,) = (tmp_path / "out/_smoke-3").glob(f"_receipts/{NAME}/*/*.json")
    counts = json.loads(receipt.read_bytes())["counts"]
    assert counts["in"] == 3, "and each was answered: random eyes may leave it without a caption"
    assert all(reason.startswith(("empty_caption", "reply_")) for reason in counts["failed"])
    assert all(row["caption"] for row in rows(tmp_path / "out/_smoke-3"))


# ---- the hub


@pytest.mark.slow
def test_a_captioner_is_fetched_and_loaded_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from huggingface_hub import constants

    from curation import backends
    from tests.backends.tiny_captioners import save_florence2

    folder, home = tmp_path / "model", tmp_path / "home"
    save_florence2(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_florence2.py").write_text("raise SystemExit('code of the hub was run')")
    gated = "somebody/gated-florence-2"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with serve({"somebody/Florence-2-tiny": Model(folder), gated: Model(folder, gated=True)}) as hub:
        environment = {**kept, "HOME": str(home), "HF_HOME": str(home), "HF_ENDPOINT": hub.url}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def fetch(*flags: str, **more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "curation", "models", "fetch", "05_recaption", *flags]
            return subprocess.run(command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True)

        dry = fetch("--model", gated, "--dry_run", HF_TOKEN=TOKEN)
        assert dry.returncode == 0, dry.stderr
        assert "gated (auto): needs a token" in dry.stdout and "model.safetensors" in dry.stdout
        assert "pytorch_model.bin" not in dry.stdout and not (home / "hub").exists()
        hub.models["somebody/Florence-2-tiny"].damaged.add("model.safetensors")
        damaged = fetch("--model", "somebody/Florence-2-tiny")
        assert damaged.returncode == 2 and "model.safetensors was damaged on its way" in damaged.stderr
        done = fetch("--model", "somebody/Florence-2-tiny")
        assert done.returncode == 0 and "whole" in done.stdout, done.stderr
    cache = home / "hub"
    names = {path.name for path in cache.glob("models--somebody--Florence-2-tiny/snapshots/*/*")}
    assert "model.safetensors" in names and not {"pytorch_model.bin", "modeling_florence2.py"} & names
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = backends.load("caption", "florence2")("somebody/Florence-2-tiny", CaptionSettings(max_tokens=4))
    assert (loaded.name, loaded.revision) == ("somebody/Florence-2-tiny", "c" * 40)


# ---- the classifier


def classifier() -> bytes:
    """Two logits of the mean of each channel, and weights that are not used, so that a download takes its time."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights"], ["logits"], transB=1),
    ]
    more = np.random.default_rng(1).standard_normal(500_000, np.float32)
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 256, 256])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((2, 3), np.float32), "weights"), numpy_helper.from_array(more, "more")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_the_stage_scores_by_a_classifier_from_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/models/test_weights.py has what can go wrong with a download."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    content = classifier()
    with ollama_stub() as port, file_server() as files:
        url = files.add("weights.onnx", content)
        flags = ["--detect_watermarks", "--watermark_model", url]
        assert run(tmp_path / "none", *flags) == 2, "a URL needs a sha256"
        assert run(tmp_path / "none", *flags, "--watermark_sha256", "0" * 64) == 2
        flags += ["--watermark_sha256", hashlib.sha256(content).hexdigest()]
        flags += ["--model", "endpoint:tulu3:fairclip", "--ports", str(port)]
        assert run(tmp_path / "out", *flags) == 0
    scores = [json.loads(line)["watermark_score"] for line in (tmp_path / "out/rows/00000003.jsonl").open("rb")]
    assert scores and all(score == pytest.approx(0.5) for score in scores)
    assert [path.suffix for path in (tmp_path / "home/.cache/curation/weights").iterdir()] == [".onnx"]
