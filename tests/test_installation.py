"""The extras of whole installations, what install.sh makes of them, and what tells of builds that do not fit.

``make test`` walks the requirements of the packages that are installed; ``make soak`` has pip resolve each target.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from curation.models import builds
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
STAGES = ("download", "faces", "language", "llm", "generate", "recaption", "metadata")
COMMANDS = ("tables", "quantize", "hub", "remote", "report")
# Of each target: the extra, the machine, and its onnxruntime.
TARGETS = {
    "x86-64 CPU": ("cpu", "x86_64", "onnxruntime"),
    "x86-64 CUDA": ("gpu", "x86_64", "onnxruntime-gpu"),
    "aarch64 CUDA": ("gpu", "aarch64", "onnxruntime"),  # PyPI has no onnxruntime-gpu for it
    "aarch64 CUDA, resolved elsewhere": ("gpu-aarch64", "x86_64", "onnxruntime"),
}


def environment(machine: str, extra: str = "") -> dict[str, str]:
    return {"platform_machine": machine, "sys_platform": "linux", "platform_system": "Linux", "extra": extra}


def requirements(package: str, extras: set[str], machine: str) -> list[Requirement]:
    """What a package, or this project, requires on such a machine; none of one that is not installed here."""
    if package == PROJECT["name"]:
        lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    else:
        try:
            # Both builds of onnxruntime require the same, and only one of them is installed.
            lines = metadata.requires("onnxruntime" if package in builds.ONNXRUNTIMES else package) or []
        except metadata.PackageNotFoundError:
            return []
    found = [Requirement(line) for line in lines]
    return [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate(environment(machine, extra)) for extra in extras | {""})
    ]


def closure(extras: set[str], machine: str) -> set[str]:
    """The names of all packages that the project with these extras brings along."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(PROJECT["name"], frozenset(extras))]
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        for one in requirements(package, set(wanted), machine):
            waiting.append((canonicalize_name(one.name), frozenset(one.extras)))
    return {package for package, _ in seen}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_has_every_package_of_every_stage_and_one_onnxruntime(target: str) -> None:
    extra, machine, onnxruntime = TARGETS[target]
    found = closure({extra}, machine)
    wanted = closure({*STAGES, *COMMANDS}, machine) - {"onnxruntime"}
    assert not wanted - found, "a stage or a command would lack these"
    assert found & set(builds.ONNXRUNTIMES) == {onnxruntime}
    with_tools = closure({extra, "dev"}, machine)  # what install.sh installs
    assert with_tools & set(builds.ONNXRUNTIMES) == {onnxruntime}


def test_constraints_pin_what_the_extras_name() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines_of("constraints.txt")}
    named = {canonicalize_name(Requirement(line).name) for lines in EXTRAS.values() for line in lines}
    assert named - {PROJECT["name"]} <= pinned


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text("utf-8").splitlines() if "==" in line and not line.startswith("#")]


ARM_TAGS = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 35))]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("extra", "machine"), [("cpu", "x86_64"), ("gpu", "x86_64"), ("gpu-aarch64", "aarch64")])
def test_pip_resolves_the_target(extra: str, machine: str, tmp_path: Path) -> None:
    """From the package index, with the pinned versions.  Nothing but metadata is fetched.

    For the CPU, and for x86-64 with CUDA, torch is the one that is installed here; torch for aarch64 is the index's.
    """
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--no-build-isolation", "--report", str(report), "-c", str(ROOT / "constraints.txt")]
    if machine == "aarch64":
        command += ["--only-binary", ":all:", "--target", str(tmp_path / "none")]
        command += [word for tag in ARM_TAGS for word in ("--platform", tag)]
    else:
        (tmp_path / "torch.txt").write_text(f"torch==={metadata.version('torch')}\n")
        command += ["-c", str(tmp_path / "torch.txt")]
    done = subprocess.run([*command, f"{ROOT}[{extra}]"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    installed = {canonicalize_name(one["metadata"]["name"]) for one in json.loads(report.read_bytes())["install"]}
    assert installed & set(builds.ONNXRUNTIMES) == {"onnxruntime-gpu" if extra == "gpu" else "onnxruntime"}
    assert closure({*STAGES, *COMMANDS}, machine) - {"onnxruntime"} <= installed | {"triton", "setuptools"}
    if "+cpu" in metadata.version("torch"):
        cuda = {name for name in installed if name.startswith("nvidia-")}
        assert bool(cuda) == (machine == "aarch64"), "CUDA's libraries come where torch has CUDA, and nowhere else"


# ---- install.sh


def test_install_sh_gpu_shows_its_plan() -> None:
    before = os.stat(ROOT / ".venv").st_mtime_ns
    command = ["bash", str(ROOT / "install.sh"), "gpu", "--dry_run"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr
    pins = dict(line.split("==") for line in lines_of("constraints.txt"))
    assert f"torch {pins['torch']} and onnxruntime-gpu {pins['onnxruntime-gpu']} are built for CUDA 13" in said
    assert "driver 580 or newer" in said
    steps = [line.partition("would do: ")[2] for line in said.splitlines() if "would do: " in line]
    if platform.machine() == "x86_64":
        assert steps[:2] == ["make_environment .venv", "remove_package .venv onnxruntime"]
    assert "pip_install .venv --constraint .venv/gpu-constraints.txt --editable .[gpu,dev]" in steps
    assert steps[-2:] == ["finish .venv gpu", "say_devices"]
    assert "nothing was changed" in said
    assert os.stat(ROOT / ".venv").st_mtime_ns == before


# ---- what is told of builds that do not fit


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    there = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(builds, "installed_version", lambda package: there.get(package, ""))


def test_the_command_that_mends_an_onnxruntime_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    pretend_installed(monkeypatch, torch="2.13.0", onnxruntime="1.31.1")
    told = builds.onnxruntime_with_cuda()
    assert "pip uninstall -y onnxruntime && " in told and told.endswith("pip install --no-deps onnxruntime-gpu")
    pretend_installed(monkeypatch, torch="2.13.0", onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && " in builds.onnxruntime_with_cuda()
    assert "share their files" in builds.onnxruntime_line()[1]
    pretend_installed(monkeypatch, torch="2.13.0")
    assert builds.onnxruntime_with_cuda().endswith("[gpu]'")
    pretend_installed(monkeypatch, torch="2.13.0+rocm7.2", onnxruntime="1.31.1")
    assert "AMD" in builds.onnxruntime_with_cuda()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    pretend_installed(monkeypatch, torch="2.13.0", onnxruntime="1.31.1")
    assert f"--index-url {builds.AARCH64_INDEX} onnxruntime-gpu" in builds.onnxruntime_with_cuda()


@pytest.mark.parametrize(
    ("cuda", "driver", "told"),
    [
        ("13.0", "550.54.15", "needs driver 580 or newer, and this machine has 550.54.15"),
        ("13.0", "580.65.06", "580.65.06 is new enough"),
        ("12.8", "550.54.15", "550.54.15 is new enough"),
        ("13.0", None, "no NVIDIA driver can be seen"),
        (None, "580.65.06", "a build for the CPU"),
    ],
)
def test_why_torch_sees_no_gpu(
    cuda: str | None, driver: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    file = tmp_path / "version"
    if driver:
        kernel = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (a@b)  Sun Jul 20"
        file.write_text(f"{kernel}\nGCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6)\n")
    monkeypatch.setattr(builds, "_DRIVER_FILE", file)
    assert told in builds.why_torch_sees_no_gpu()


def test_the_check_says_what_torch_and_onnxruntime_see(capsys: pytest.CaptureFixture[str]) -> None:
    code = builds.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("torch ") and second.startswith("onnxruntime")
    if "+cpu" in metadata.version("torch"):
        assert code == 2
        assert "is a build for the CPU" in first
        assert "has no CUDA: " in second and "pip uninstall -y onnxruntime" in second
