"""Where a process runs, until when, and how it is stopped."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from curation import cluster
from curation.cluster import (
    Allocation,
    StopSignal,
    gpus_promised,
    host_identity,
    memory_share,
    parse_deadline,
    process_is_gone,
    process_start,
    run_id,
    slurm_ids,
    slurm_job_end,
    visible_gpus,
    workers_for_gpus,
)
from curation.errors import InfrastructureError, Stopped, UsageError
from curation.models.batch_size import use_device
from curation.models.onnx import open_session
from curation.options import logger
from tests import processes


def detect(workers: int = 1, **environ: str) -> Allocation:
    return Allocation.detect(workers, environ)


def test_a_lone_start_takes_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert detect(CUDA_VISIBLE_DEVICES="") == Allocation(threads=6)
    assert detect(workers=4, CUDA_VISIBLE_DEVICES="").threads == 1
    assert detect(workers=100, CUDA_VISIBLE_DEVICES="").threads == 1


def test_a_task_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    found = detect(
        SLURM_JOB_ID="77", SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_LOCALID="1", SLURM_CPUS_PER_TASK="16",
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )  # fmt: skip
    assert (found.rank, found.world, found.local_rank, found.gpu, found.threads) == (5, 8, 1, 1, 16)


@pytest.mark.parametrize(
    ("element", "first", "rank"), [("3", "3", 1), ("5", "3", 5), ("0", "0", 1), ("9", "9", 1)]
)  # elements may start anywhere
def test_an_array_counts_its_elements(element: str, first: str, rank: int) -> None:
    found = detect(
        SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_ARRAY_TASK_COUNT="4", SLURM_ARRAY_TASK_ID=element,
        SLURM_ARRAY_TASK_MIN=first,
    )  # fmt: skip
    assert (found.rank, found.world) == (rank, 8)


def test_every_process_of_an_array_of_steps_of_workers_has_its_own_rank() -> None:
    ranks = [
        detect(
            SLURM_PROCID=str(task), SLURM_NTASKS="3", SLURM_LOCALID=str(task), SLURM_ARRAY_TASK_COUNT="2",
            SLURM_ARRAY_TASK_ID=str(element), SLURM_ARRAY_TASK_MIN="1", CURATION_WORKER=f"{worker}/4",
            CUDA_VISIBLE_DEVICES="0,1",
        )
        for element in (1, 2) for task in range(3) for worker in range(4)
    ]  # fmt: skip
    assert sorted(found.rank for found in ranks) == list(range(24))
    assert {found.world for found in ranks} == {24}
    assert {found.gpu for found in ranks} == {0, 1}


@pytest.mark.parametrize("junk", ["", "x", "-1", "1(x3)", "²"])
def test_variables_that_are_no_numbers_count_as_absent(junk: str) -> None:
    found = detect(SLURM_PROCID=junk, SLURM_NTASKS=junk, SLURM_ARRAY_TASK_COUNT=junk, CURATION_WORKER=f"{junk}/2")
    assert (found.rank, found.world) == (0, 1)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("", 0), ("0", 1), ("3", 1), ("0,1,2,3", 4), (" 0 , 1 ", 2), ("-1", 0), ("NoDevFiles", 0), ("0,-1,1", 1),
        ("GPU-8f6d1a2c-0000,GPU-9", 2), ("MIG-5c8a", 1), ("MIG-GPU-8f/1/0,MIG-GPU-8f/2/0", 2), ("0,,1", 1), ("none", 0),
    ],
)  # fmt: skip
def test_shapes_of_cuda_visible_devices(visible: str, count: int) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_gpus(environ) == count
    gpus = [detect(SLURM_LOCALID=str(rank), CUDA_VISIBLE_DEVICES=visible).gpu for rank in range(5)]
    assert gpus == ([rank % count for rank in range(5)] if count else [None] * 5)


def test_run_ids() -> None:
    def of(interactive: bool = False, **environ: str) -> str:
        return run_id(environ, interactive)

    assert of() == ""
    assert of(SLURM_JOB_ID="12") == "slurm-12"
    assert of(SLURM_JOB_ID="14", SLURM_ARRAY_JOB_ID="12") == "slurm-12", "the elements of an array are one run"
    assert of(SLURM_JOB_ID="12", CURATION_RUN_ID="abc") == "run-abc"
    assert of(interactive=True, SLURM_JOB_ID="12") == "", "two commands typed in one allocation are two runs"
    assert of(interactive=True, CURATION_RUN_ID="abc") == "run-abc"


def test_what_a_receipt_records_of_slurm() -> None:
    environ = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "2", "SLURM_PROCID": "", "SLURM_SECRET": "x"}
    assert slurm_ids(environ) == {"job_id": "1", "restart_count": "2"}


NOW = datetime(2026, 1, 31, 12, 0, 0).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("01:30:00", 5400), ("100:00:01", 360_001), ("2H", 7200),
        ("2026-01-31T18:00:00", 6 * 3600), ("2026-01-31 18:00", 6 * 3600), (" 10m ", 600),
        ("2 h", 7200), ("90min", 5400), ("90 minutes", 5400), ("2h30m", 9000), ("1 h 30 min", 5400), ("1d", 86400),
        ("1 hour, 5 secs", 3605), ("1-12:00:00", 129_600),
    ],
)  # fmt: skip
def test_deadlines(text: str, seconds: float) -> None:
    assert parse_deadline(text, NOW, {}) == NOW + seconds


def test_a_deadline_in_another_zone() -> None:
    assert parse_deadline("2026-01-31T18:00:00Z", NOW, {}) == parse_deadline("2026-01-31T20:00:00+02:00", NOW, {})


def test_no_deadline() -> None:
    assert parse_deadline("none", NOW, {"SLURM_JOB_END_TIME": "5"}) is None
    assert parse_deadline(None, NOW, {}) is None


@pytest.mark.parametrize(
    "text", ["", "soon", "30", "1w", "1:2:3", "2h30", "1 5h", "1:30", "2 horses", "-5m", "31.01.2026", "25:61", "nan"]
)
def test_deadlines_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--deadline"):
        parse_deadline(text, NOW, {})


def test_a_clock_that_is_off_does_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1790000000", "CURATION_TIME_LEFT": "1:00:00"}
    monkeypatch.setattr(time, "time", lambda: 1_790_000_000.0 + 600)  # the job seems over
    assert parse_deadline(None, None, environment) == 1_790_000_000.0 + 600 + 3600


@pytest.mark.parametrize("element", ["x", "-1", "9", "²"])
def test_an_array_element_that_cannot_be(element: str) -> None:
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID"):
        detect(SLURM_ARRAY_TASK_ID=element, SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_MAX="7")


def test_an_array_with_steps() -> None:
    elements = [
        detect(SLURM_ARRAY_TASK_ID=n, SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_MIN="5", SLURM_ARRAY_TASK_MAX="13",
               SLURM_ARRAY_TASK_STEP="4").rank
        for n in ("5", "9", "13")
    ]  # fmt: skip
    assert elements == [0, 1, 2]


def test_the_end_of_the_job_is_the_deadline() -> None:
    assert parse_deadline(None, NOW, {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1790000000"}) == 1790000000.0


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("echo 6:00:00", 6 * 3600),
        ("echo 1-00:00:10", 86_410),
        ("echo 2:05", 125),
        ("echo 0:00", 0),
        ("echo UNLIMITED", None),
        ("echo INVALID", None),
        ("echo", None),
        ("exit 1", None),
        ("echo Invalid job id >&2; exit 1", None),
    ],
)
def test_asking_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, end: float | None) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{script}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = slurm_job_end({"SLURM_JOB_ID": "4711"})
    assert found == (None if end is None else pytest.approx(time.time() + end, abs=3))
    assert "--jobs 4711" in (tmp_path / "asked").read_text()


def test_a_job_id_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    assert slurm_job_end({"SLURM_JOB_ID": "--me"}) is None


# ---- who lives


def test_processes() -> None:
    me = process_start(os.getpid())
    assert me is not None
    assert not process_is_gone(os.getpid(), me)
    assert process_is_gone(os.getpid(), str(int(me) + 1)), "the pid was given to another process"
    child = subprocess.Popen(["sleep", "60"])
    start = process_start(child.pid)
    assert start is not None
    assert not process_is_gone(child.pid, start)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_is_gone(child.pid, start), "a zombie does no work"
    child.wait()
    assert process_is_gone(child.pid, start)


def test_a_process_that_proc_hides_is_not_presumed_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid shows nothing of another user's processes."""
    monkeypatch.setattr(cluster, "process_start", lambda pid: None)
    monkeypatch.setattr(os.path, "exists", lambda path: False)

    def not_permitted(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_permitted)
    assert not process_is_gone(4711, "1")


PROMISES = [
    {"CUDA_VISIBLE_DEVICES": "0"},
    {"CUDA_VISIBLE_DEVICES": "GPU-8e,GPU-9f"},
    {"HIP_VISIBLE_DEVICES": "0"},
    {"ROCR_VISIBLE_DEVICES": "0,1"},
    {"ZE_AFFINITY_MASK": "0.0,0.1"},
    {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_GPUS": "0"},
    {"SLURM_STEP_GPUS": "3"},
    {"SLURM_GPUS": "2"},
    {"SLURM_GPUS": "a100:2"},
    {"SLURM_GPUS_ON_NODE": "1"},
    {"SLURM_GPUS_PER_TASK": "gpu:10"},
]
NO_PROMISES = [
    {"CUDA_VISIBLE_DEVICES": "-1,0"},
    {"CUDA_VISIBLE_DEVICES": ""},
    {"CUDA_VISIBLE_DEVICES": "-1"},
    {"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0"},  # whoever hides the GPUs has asked for the CPU
    {"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "2"},
    {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
    {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_PER_NODE": "0", "SLURM_JOB_ID": "1"},
    {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_PER_TASK": "a100:0"},
    {"CUDA_VISIBLE_DEVICES": "", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8"},
]


@pytest.mark.parametrize("environ", PROMISES, ids=str)
def test_who_was_promised_gpus_and_sees_none_does_not_compute_on_the_cpu(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus_promised(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InfrastructureError, match=r"says that there are GPUs.*--device cpu"):
        Allocation(gpu=None).device()
    assert Allocation(gpu=None).device("cpu") == "cpu"
    assert Allocation(gpu=1).device() == ("xpu:1" if "ZE_AFFINITY_MASK" in environ else "cuda:1")
    assert Allocation(gpu=1).device("cpu") == "cpu"


@pytest.mark.parametrize("environ", NO_PROMISES, ids=str)
def test_without_gpus_one_line_says_that_the_cpu_computes(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not gpus_promised(environ)
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lines.append)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert [Allocation(local_rank=rank).device() for rank in range(3)] == ["cpu"] * 3
    assert lines == ["no GPU can be seen here: computing on the CPU, which is far slower"]


def test_processes_for_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="--num_gpus 2: no GPU can be seen here; with --device cpu"):
        workers_for_gpus(1, 2)
    assert workers_for_gpus(1, 2, device="cpu") == 2
    assert workers_for_gpus(3, None, device="cpu") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert workers_for_gpus(1, None, device="cpu") == 1
    assert workers_for_gpus(1, None) == 4


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3, 0]),  # LUMI
        ({"ROCR_VISIBLE_DEVICES": "3"}, [0] * 5),  # Frontier
        ({"HIP_VISIBLE_DEVICES": "4,5"}, [0, 1, 0, 1, 0]),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "1"}, [0] * 5),
        ({"ZE_AFFINITY_MASK": "0.0,0.1"}, [0, 1, 0, 1, 0]),  # Aurora
        ({"CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0,1", "ZE_AFFINITY_MASK": "0,1"}, [0, 1, 0, 1, 0]),
    ],
    ids=str,
)
def test_each_process_has_a_device_of_amd_or_intel(environ: dict[str, str], gpus: list[int]) -> None:
    assert visible_gpus(environ) == len(set(gpus))
    assert [detect(SLURM_LOCALID=str(rank), **environ).gpu for rank in range(5)] == gpus
    names = next(iter(environ.values())).split(",") if len(environ) == 1 else None
    assert names is None or cluster.gpu_name(0, environ) == names[0]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_torch_is_asked_where_nothing_else_tells_of_devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if visible_gpus():
        pytest.skip("this machine has GPUs")
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 2)
    assert visible_gpus() == 0, "nothing says that there are devices, so that torch is not loaded"
    assert [Allocation(local_rank=rank).device() for rank in range(3)] == [f"{kind}:0", f"{kind}:1", f"{kind}:0"]
    assert Allocation(gpu=1).device() == f"{kind}:1"
    assert Allocation().device("cpu") == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert workers_for_gpus(1, None) == visible_gpus() == 2
    assert workers_for_gpus(1, None, "1") == 1
    name = "CUDA_VISIBLE_DEVICES" if kind == "cuda" else "ZE_AFFINITY_MASK"
    assert os.environ.pop(name) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Allocation().device() == "cpu"


def test_without_torch_intels_list_says_what_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZE_AFFINITY_MASK", "0")
    assert Allocation.detect().device() == "xpu:0"
    with pytest.raises(InfrastructureError, match=r"xpu:0 was given but cannot be used: .*--device cpu"):
        use_device("xpu:0")


@pytest.mark.parametrize(
    ("lists", "gpus", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "0,2", {"CUDA_VISIBLE_DEVICES": "4,6"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8e,GPU-9f"}, "1", {"CUDA_VISIBLE_DEVICES": "GPU-9f"}),
        ({"CUDA_VISIBLE_DEVICES": "MIG-aa, MIG-bb,MIG-cc"}, "1-2", {"CUDA_VISIBLE_DEVICES": "MIG-bb,MIG-cc"}),
        ({"ROCR_VISIBLE_DEVICES": "4,5,6,7"}, "3", {"ROCR_VISIBLE_DEVICES": "7"}),
        (
            {"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "0,1"},
            "1",
            {"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1"},
        ),
        ({"ZE_AFFINITY_MASK": "2.0,2.1"}, "1", {"ZE_AFFINITY_MASK": "2.1"}),
        (
            {"CUDA_VISIBLE_DEVICES": "6,7", "ZE_AFFINITY_MASK": "6,7"},
            "1",
            {"CUDA_VISIBLE_DEVICES": "7", "ZE_AFFINITY_MASK": "7"},
        ),
    ],
    ids=str,
)
def test_gpus_counts_within_what_was_given(
    lists: dict[str, str], gpus: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in lists.items():
        monkeypatch.setenv(name, value)
    count = min(len(value.split(",")) for value in expected.values())
    assert workers_for_gpus(1, None, gpus, device="cpu") == count
    assert {name: os.environ[name] for name in lists} == lists, "the CPU needs no GPU"
    with pytest.raises(UsageError, match=r"--gpus 9: only \d are visible here"):
        workers_for_gpus(1, None, "9")
    assert workers_for_gpus(1, None, gpus) == count
    assert {name: os.environ[name] for name in expected} == expected


def test_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="--gpus 0,2: no GPU can be seen here; with --device cpu"):
        workers_for_gpus(1, None, "0,2")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("variables", "requested", "processes"),
    [
        ({"SLURM_NTASKS": "4"}, 4, 1),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, 4, 1),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, 4, 2),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, 4, 2),
        ({"SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1"}, 4, 4),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}, 4, 4),
        ({"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "8"}, 4, 4),  # each task has four of its own
        ({"SLURM_NTASKS": "2", "SLURM_GPUS_PER_TASK": "4"}, 4, 4),
        ({"SLURM_NTASKS": "8"}, 4, 1),
        ({}, 4, 4),
    ],
    ids=str,
)
def test_tasks_that_see_the_same_gpus_share_the_processes(
    variables: dict[str, str], requested: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1,2,3", **variables}.items():
        monkeypatch.setenv(name, value)
    assert workers_for_gpus(1, requested) == processes
    assert workers_for_gpus(1, None, "0-3") == processes
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


@pytest.mark.parametrize("own", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_torchs_segments_grow_unless_the_user_has_chosen(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "so that it is as before after the test")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "backend:native")
    Allocation().device()
    found = {name: os.environ[name] for name in names if name in os.environ}
    grows = "expandable_segments:True"
    expected = {"PYTORCH_CUDA_ALLOC_CONF": grows, "PYTORCH_ALLOC_CONF": grows}
    assert found == ({own: "backend:native"} if own else expected)


def test_an_onnxruntime_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    model = Path(onnxruntime.__file__).parent / "datasets/sigmoid.onnx"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InfrastructureError, match=r"onnxruntime-gpu.*--device cpu"):
        open_session(model.read_bytes(), model, 1, gpu=0)
    assert open_session(model.read_bytes(), model, 1, gpu=None)[1] == "cpu"


def test_the_memory_of_a_process_is_its_share_of_the_jobs(tmp_path: Path) -> None:
    def cgroup(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_share({}, tmp_path) == machine
    cgroup("proc/self/cgroup", "4:memory:/v1/step\n0::/job/step")
    cgroup("sys/fs/cgroup/job/step/memory.max", "max")
    assert memory_share({}, tmp_path) == machine
    cgroup("sys/fs/cgroup/job/memory.max", str(800 << 20))
    assert memory_share({}, tmp_path) == 800 << 20, "that of the job bounds its steps"
    cgroup("sys/fs/cgroup/memory/v1/step/memory.limit_in_bytes", str(600 << 20))
    assert memory_share({"SLURM_TASKS_PER_NODE": "2(x3),1"}, tmp_path) == 300 << 20
    assert memory_share({"SLURM_MEM_PER_NODE": "400", "CURATION_WORKER": "1/4"}, tmp_path) == 100 << 20
    assert memory_share({"SLURM_MEM_PER_CPU": "50", "SLURM_CPUS_ON_NODE": "4"}, tmp_path) == 200 << 20


def test_identity_tells_hosts_boots_and_containers_apart() -> None:
    host, boot, namespace = host_identity()
    assert host
    assert len(boot) == 36
    assert namespace.startswith("pid:[")


# ---- stopping


def test_a_deadline_drains_before_it_comes() -> None:
    far = StopSignal(time.time() + 3600)
    assert not far.draining
    assert far.deadline is not None
    assert 55 < time.time() + 3600 - far.deadline < 65, "a minute to save in"
    near = StopSignal(time.time() + 10)
    assert not near.draining, "a short run is not all margin"
    past = StopSignal(time.time() - 1)
    assert past.draining
    assert past.cause == "deadline"
    assert not past.urgent
    past.check(urgent_only=True)
    with pytest.raises(Stopped, match="deadline"):
        past.check()


def test_waiting_ends_at_the_deadline() -> None:
    stop = StopSignal(time.time() + 0.2)
    assert stop.wait(3600)
    assert StopSignal(time.time() - 100).wait(3600)


def test_the_first_cause_is_kept() -> None:
    stop = StopSignal()
    assert not stop.wait(0)
    stop.ask("SIGUSR1")
    stop.ask("SIGTERM", urgent=True)
    assert stop.cause == "SIGUSR1"
    assert stop.urgent
    with pytest.raises(Stopped):
        stop.check(urgent_only=True)


PROGRAM = """
import sys
from curation import cluster
from curation.cluster import StopSignal
cluster.ONE_SIGNAL_S = float(sys.argv[1])
stop = StopSignal()
stop.install()
print("ready", flush=True)
while not stop.draining:
    stop.wait(60)
print(stop.cause, "urgent" if stop.urgent else "drains", flush=True)
sys.stdin.readline()
print("ended by itself", stop.cause, "urgent" if stop.urgent else "drains", flush=True)
"""


@pytest.mark.parametrize(
    ("signals", "says", "code"),
    [
        (["USR1"], "SIGUSR1 drains", 0),
        (["USR2"], "SIGUSR2 drains", 0),
        (["INT"], "SIGINT drains", 0),
        (["TERM"], "SIGTERM urgent", 0),
        (["USR1", "USR1", "TERM"], "SIGUSR1 urgent", 0),
        (["TERM", "TERM"], "SIGTERM urgent", 0),  # one signal on two ways
        (["TERM", "", "TERM"], None, 75),
        (["INT", "INT"], None, 75),
        (["INT", "TERM"], None, 75),
    ],
)
def test_signals(signals: list[str], says: str | None, code: int) -> None:
    """One drains or hurries, the second of SIGINT and SIGTERM ends on the spot (``""`` is a while)."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    one_signal_s = 0.2 if "" in signals else 3600
    process = processes.start([sys.executable, "-c", PROGRAM, one_signal_s], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{signals[0]}"))
    first = process.stdout.readline()
    for name in signals[1:]:
        if name:
            process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.05 if name else 0.3)
    rest, _ = process.communicate("\n" if says else None, timeout=120)
    assert process.returncode == code
    if says is None:
        assert "by itself" not in rest
    else:
        assert first.split()[0] == says.split()[0]
        assert rest == f"ended by itself {says}\n"


# ---- threads that decode


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 16),
        ({"SLURM_CPUS_ON_NODE": "8"}, 8),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_PROCID": "1", "SLURM_TASKS_PER_NODE": "4(x2)"}, 2),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "4"}, 8),  # the job's script, outside its tasks
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "16"}, 16),  # its threads count these already
        ({"SLURM_CPUS_ON_NODE": "8", "CURATION_WORKER": "2/4"}, 2),
        ({"SLURM_CPUS_ON_NODE": "odd", "CURATION_WORKER": "0/0", "SLURM_TASKS_PER_NODE": "x"}, 16),
    ],
)
def test_threads_beside_the_device_are_those_of_the_job(environ: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert cluster.cores(16, environ, tmp_path) == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "400000 100000"}, 4),
        ("0::/job/step", {"job/step/cpu.max": "250000 100000", "job/cpu.max": "400000 100000"}, 2),
        ("0::/of/the/host", {"cpu.max": "50000 100000"}, 1),
        ("0::/../../../elsewhere", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "600000", "cpu/job/cpu.cfs_period_us": "100000"}, 6),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 16),
        ("3:memory:/job", {"job/cpu.max": "100000 100000"}, 16),
        ("0::/", {"cpu.max": "what 0"}, 16),
    ],
)
def test_threads_beside_the_device_are_those_of_the_control_group(
    own: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    for name, text in {
        "proc/self/cgroup": own,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cluster.cores(16, {}, tmp_path) == expected
