"""A real SLURM on this machine for the tests: several nodes, each with its own host name, and GPUs that are links to
/dev/null.

Runs as root, without systemd and cgroups, and keeps everything below one folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import wait_until

SBIN = "/usr/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd-%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd-%n.log
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1000,bf_interval=1,bf_window=1440
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
KillWait=5
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port={first}-{last} CPUs={cpus} RealMemory=16384 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL LLN=YES Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return missing if os.geteuid() == 0 else [*missing, "root's rights"]


@dataclass
class Cluster:
    """``boot`` starts it and ``stop`` ends it, with all that its jobs left."""

    base: Path
    nodes: int = 3
    cpus: int = 8
    gpus: int = 4
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # ---- life and death

    def boot(self) -> None:
        for name in ("etc", "log", "run", "state", "spool", "dev", "munge"):
            (self.base / name).mkdir(parents=True)
        (self.base / "munge").chmod(0o700)
        key = self.base / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for number in range(self.gpus):
            (self.base / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        devices = f"{self.base}/dev/nvidia[0-{self.gpus - 1}]"
        (self.base / "etc" / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu File={devices}\n")
        port = _free_ports(self.nodes + 1)
        self.configuration.write_text(
            CONFIGURATION.format(
                base=self.base, port=port, first=port + 1, last=port + self.nodes, nodes=self.nodes, cpus=self.cpus,
                gpus=self.gpus,
            )
        )  # fmt: skip
        self._start(
            "munged", "munged", "--foreground", f"--key-file={key}", f"--socket={self.base}/run/munge.socket",
            f"--pid-file={self.base}/run/munged.pid", f"--log-file={self.base}/munge/munged.log",
            f"--seed-file={self.base}/munge/munged.seed",
        )  # fmt: skip
        wait_until((self.base / "run" / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D")
        wait_until(lambda: self.call("scontrol", "ping", check=False).returncode == 0, "slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(f"node{number}")
        wait_until(lambda: self.idle_nodes() == self.nodes, "the nodes")

    def start_node(self, name: str) -> None:
        """A slurmd under the node's own host name."""
        self._start(name, "unshare", "--uts", "sh", "-c", f"hostname {name} && exec slurmd -D -N {name}")

    def kill_slurmd(self, name: str) -> None:
        """The node is lost to SLURM, while the processes of its jobs live on."""
        self.processes[name].kill()
        self.processes[name].wait()

    def kill_node(self, name: str) -> None:
        """slurmd, its stepds, and every process of the node's jobs."""
        self.kill_slurmd(name)
        for _ in range(3):  # some may just be starting others
            for pid in self.job_processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def revive(self) -> None:
        """Nodes that a test has killed or set down serve again."""
        for number in range(1, self.nodes + 1):
            name = f"node{number}"
            if self.processes[name].poll() is not None:
                for pid in self.job_processes(name):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self.start_node(name)
        self.call("scontrol", "update", f"NodeName=node[1-{self.nodes}]", "State=RESUME", check=False)
        wait_until(lambda: self.idle_nodes() == self.nodes, "the nodes again")

    def end_jobs(self) -> None:
        """No job is left, and no process of one, of nodes that SLURM has lost neither."""
        self.call("scancel", "--user=root", check=False)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.squeue() and not self.job_processes(None), "the last jobs", seconds=8)
        for pid in self.job_processes(None):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.end_jobs()
        for name in reversed(list(self.processes)):
            self.processes[name].terminate()
        for process in reversed(list(self.processes.values())):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, name: str, *command: str) -> None:
        with open(self.base / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=self.environment(),
            )  # fmt: skip

    def job_processes(self, node: str | None, job: str | None = None) -> list[int]:
        """Processes of this cluster's jobs and their stepds, on one node or on all, of one job or of all."""
        found = []
        mark = f"SLURM_CONF={self.configuration}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                name = (entry / "comm").read_text().strip()
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark not in variables:
                continue
            of_node = node is None or f"SLURMD_NODENAME={node}".encode() in variables
            is_stepd = name == "slurmstepd" and (node is None or node.encode() in _host_of(entry))
            is_job = any(v.startswith(b"SLURM_JOB_ID=") for v in variables) and of_node
            if job is not None and f"SLURM_JOB_ID={job}".encode() not in variables:
                continue
            if is_stepd or (is_job and b"slurmctld" not in arguments):
                found.append(int(entry.name))
        return found

    # ---- talking to it

    @property
    def configuration(self) -> Path:
        return self.base / "etc" / "slurm.conf"

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "PATH": f"{kept['PATH']}:{SBIN}", "SLURM_CONF": str(self.configuration), **(more or {})}

    def call(
        self, *command: str, check: bool = True, more: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=self.environment(more), cwd=cwd, check=False
        )
        if check:
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done

    def idle_nodes(self) -> int:
        return len(set(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).stdout.split()))

    def sbatch(self, *arguments: str, cwd: Path, variables: Mapping[str, str]) -> str:
        """Submit; the job's id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, more=variables).stdout.strip()

    def squeue(self, job: str | None = None) -> dict[str, tuple[str, str]]:
        """Jobs that are not over: element → (state, node)."""
        which = ["-j", job] if job else []
        lines = self.call("squeue", "-h", "-r", "-o", "%i|%T|%N", *which, check=False).stdout.splitlines()
        return {element: (state, node) for element, state, node in (line.split("|") for line in lines)}

    def facts(self, job: str) -> list[dict[str, str]]:
        """What scontrol knows of each element of a job."""
        text = self.call("scontrol", "--oneliner", "show", "job", job).stdout
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines() if line]

    def wait(self, *jobs: str) -> list[int]:
        """Until they are over; the exit codes of all elements."""

        def over() -> bool:
            states = {facts["JobState"] for job in jobs for facts in self.facts(job)}
            return not states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}

        wait_until(over, lambda: f"the end of jobs {jobs}: {self.squeue()}", seconds=200)
        return [int(facts["ExitCode"].split(":")[0]) for job in jobs for facts in self.facts(job)]


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nobody listens on."""
    for port in range(16800, 30000, count):
        with contextlib.ExitStack() as stack:
            try:
                for number in range(port, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            return port
    raise AssertionError("no free ports")


def _host_of(process: Path) -> bytes:
    """The host name that a process sees: its UTS namespace is its node's."""
    done = subprocess.run(
        ["nsenter", f"--uts=/proc/{process.name}/ns/uts", "hostname"], capture_output=True, check=False
    )
    return done.stdout
