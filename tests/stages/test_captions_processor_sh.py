"""02_captions_processor.sh with stand-ins for ollama and SLURM: servers, exit codes, signals, and queueing again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, processes
from tests.processes import started, wait_until
from tests.servers import ollama_stub

SCRIPT = ROOT / "02_captions_processor.sh"
STUB = ROOT / "tests" / "servers" / "ollama_stub.py"

OLLAMA = f"""#!/bin/bash
[ "$1" = serve ] || exit 9
echo "$CUDA_VISIBLE_DEVICES $OLLAMA_HOST $OLLAMA_NUM_PARALLEL $OLLAMA_KEEP_ALIVE" >>"$LOG/ollama"
[ -n "${{BROKEN:-}}" ] && echo "no such driver" && exit 1
exec {sys.executable} {STUB} --port "${{OLLAMA_HOST#*:}}" --latency_s "${{LATENCY_S:-0}}" \\
    --die_after "${{DIE_AFTER:-0}}" --model "${{MODEL_OF_STUB:-tulu3:fairclip}}"
"""
# One task; signals reach every process of it, as SLURM sends them.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
setsid "$@" &
trap 'kill -USR1 -- -$!' USR1
trap 'kill -TERM -- -$!' TERM
while kill -0 $! 2>/dev/null; do wait $!; done
wait $!
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] || echo "$@" >>"$LOG/scontrol"
"""
NO_SLURM = """#!/bin/bash
exit 1
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job with two GPUs and captions to ask about."""
    (tmp_path / "bin").mkdir()
    for name, text in (("ollama", OLLAMA), ("scontrol", SCONTROL), ("srun", SRUN), ("squeue", NO_SLURM)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    folder = tmp_path / "captions with a space"
    folder.mkdir()
    captions = {f"{n:03d}.json": f"A woman walks her dog along the beach, number {n}" for n in range(60)}
    (folder / "00000000.json").write_text(json.dumps(captions))
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SRC_DIR": str(folder),
        "TARGET_DIR": f"{tmp_path}/prompts",
        "CUDA_VISIBLE_DEVICES": "0,GPU-7",
        "LOG": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RESTART_PAUSE_S": "0.1",
    }


def has_replies(root: Path) -> bool:
    return any(path.is_file() and path.stat().st_size for path in (root / "prompts" / "_partial").rglob("*"))


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def left_behind(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "prompts").glob(".job-*")]


def test_a_server_per_gpu_and_the_stage_with_them(job: dict[str, str], tmp_path: Path) -> None:
    assert subprocess.run([SCRIPT, "--groups", "none"], env=job, check=False, timeout=120).returncode == 0
    servers = sorted(line.split() for line in (tmp_path / "ollama").read_text().splitlines())
    assert [gpu for gpu, *_ in servers] == ["0", "GPU-7"]
    assert len({host for _, host, *_ in servers}) == 2
    assert all(host.startswith("127.0.0.1:") for _, host, *_ in servers), "servers of this job alone"
    assert all(rest == ["4", "-1"] for _, _, *rest in servers)
    prompts = json.loads((tmp_path / "prompts" / "00000000.json").read_bytes())
    assert len(prompts) == 60
    assert prompts["000.json"].startswith("A photo, A woman walks")
    assert not left_behind(tmp_path)
    assert not any(listens(int(host.split(":")[1])) for _, host, *_ in servers)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"BROKEN": "1"}, "no such driver"),
        ({"BROKEN": "1"}, "no model server started"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "no GPU was allocated"),
        ({"OLLAMA": "no-such-ollama"}, "no no-such-ollama on the PATH"),
        ({"ENDPOINTS": "http://127.0.0.1:1"}, "no endpoint answers"),
        ({"PORTS": "1"}, "no endpoint answers"),
        ({"ENDPOINTS": "localhost"}, "is not a URL"),
    ],
)
def test_what_the_machine_lacks(changes: dict[str, str], says: str, job: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT], env={**job, **changes}, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr
    assert not left_behind(tmp_path)


def test_root_names_both_folders_and_plain_bash_will_do(job: dict[str, str], tmp_path: Path) -> None:
    """On a workstation: no SLURM, no GPU, servers all the same; the model is the one that the stage is given."""
    kept = {name: job[name] for name in ("PATH", "PYTHON", "LOG")}
    (tmp_path / "captions with a space").rename(tmp_path / "captions")
    environment = {**kept, "ROOT": str(tmp_path), "SERVERS": "2", "MODEL_OF_STUB": "other:model"}
    command = [SCRIPT, "--groups", "none", "--model_name", "other:model"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False, timeout=120).returncode == 0
    assert len(json.loads((tmp_path / "prompts" / "00000000.json").read_bytes())) == 60
    assert not left_behind(tmp_path)
    assert not (tmp_path / "logs").exists()


def test_servers_that_run_already(job: dict[str, str], tmp_path: Path) -> None:
    """By their ports: none is started, and none is stopped."""
    with ollama_stub() as port:
        environment = {**job, "PORTS": str(port), "CUDA_VISIBLE_DEVICES": ""}
        assert (
            subprocess.run([SCRIPT, "--host", "127.0.0.1"], env=environment, check=False, timeout=120).returncode == 0
        )
        with socket.create_connection(("127.0.0.1", port)):
            pass
    assert not (tmp_path / "ollama").exists()
    assert len(json.loads((tmp_path / "prompts" / "00000000.json").read_bytes())) == 60


def test_a_server_that_dies_is_started_again(job: dict[str, str], tmp_path: Path) -> None:
    environment = {**job, "CUDA_VISIBLE_DEVICES": "0", "DIE_AFTER": "25"}
    assert subprocess.run([SCRIPT], env=environment, check=False, timeout=120).returncode == 0
    assert len((tmp_path / "ollama").read_text().splitlines()) == 3
    assert len(json.loads((tmp_path / "prompts" / "00000000.json").read_bytes())) == 60


def test_servers_end_with_a_script_that_is_killed(job: dict[str, str], tmp_path: Path) -> None:
    process = processes.start([SCRIPT], env={**job, "LATENCY_S": "0.5"})
    try:
        registered = (tmp_path / "prompts").glob
        wait_until(lambda: list(registered(".job-servers-*/*.json")), "a server", while_runs=process)
    finally:
        process.kill()  # it alone: what it started has to notice
        process.wait()
    ports = [int(line.split()[1].split(":")[1]) for line in (tmp_path / "ollama").read_text().splitlines()]
    wait_until(lambda: not any(listens(port) for port in ports), "the servers' end")


def test_folders_must_be_named(job: dict[str, str]) -> None:
    del job["SRC_DIR"]
    done = subprocess.run([SCRIPT], env=job, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the folder of captions that stage 01 wrote" in done.stderr


@pytest.mark.parametrize(
    ("number", "restarts", "requeued"),
    [(signal.SIGUSR1, "0", True), (signal.SIGUSR1, "50", False), (signal.SIGTERM, "0", False)],
)
def test_at_the_time_limit_it_queues_itself_again(
    number: signal.Signals, restarts: str, requeued: bool, job: dict[str, str], tmp_path: Path
) -> None:
    with started([SCRIPT], env={**job, "LATENCY_S": "0.5", "SLURM_RESTART_COUNT": restarts}) as process:
        wait_until(lambda: has_replies(tmp_path), "replies on disk", while_runs=process)
        process.send_signal(number)
        assert process.wait(timeout=120) == 75
    asked = (tmp_path / "scontrol").read_text().split() if (tmp_path / "scontrol").exists() else []
    assert asked == (["requeue", job["SLURM_JOB_ID"]] if requeued else [])
    assert not left_behind(tmp_path)


def test_an_array_element_queues_itself_alone(job: dict[str, str], tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
    with started([SCRIPT], env={**job, **array, "LATENCY_S": "0.5"}) as process:
        wait_until(lambda: has_replies(tmp_path), "replies on disk", while_runs=process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 75
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "70_3"]
