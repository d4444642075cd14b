"""One cluster for all tests here, in good order before each of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import copy_tree
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.jobs import Jobs, small_shards
from tests.slurm.rewriting import Rewriting


@pytest.fixture(scope="session")
def booted() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"a real SLURM needs {', '.join(missing)} (tests/slurm/install.sh)")
    assert not missing, "CI must run these tests"
    base = Path(tempfile.mkdtemp(prefix="slurm-"))
    base.chmod(0o755)  # munge insists that its socket can be reached
    cluster = Cluster(base)
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def cluster(booted: Cluster) -> Iterator[Cluster]:
    booted.call("scancel", "--user=root", check=False)
    booted.revive()
    yield booted
    booted.end_jobs()


@pytest.fixture(scope="session")
def forty_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("forty"), 40)


@pytest.fixture
def jobs(cluster: Cluster, forty_shards: Path, tmp_path: Path) -> Jobs:
    return Jobs(cluster, forty_shards, tmp_path / "root")


@pytest.fixture(scope="session")
def prepared(booted: Cluster, llm_port: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve shards, and a root folder on which stages 01 and 02 have run."""
    base = tmp_path_factory.mktemp("prepared")
    (base / "shards").mkdir()
    jobs = Jobs(booted, small_shards(base / "shards", 12), base / "root")
    jobs.alone(jobs.root, "01_filter_noface.sh", "--detector", "recorded", "--quiet")
    asks = {"PORTS": str(llm_port)}
    jobs.alone(jobs.root, "02_captions_processor.sh", "--api", "ollama", "--quiet", variables=asks)
    return base / "shards", jobs.root


@pytest.fixture
def ready_to_generate(cluster: Cluster, prepared: tuple[Path, Path], tmp_path: Path) -> Jobs:
    """A root of its own on which stages 01 and 02 have run."""
    shards, root = prepared
    copy_tree(root, tmp_path / "root")
    return Jobs(cluster, shards, tmp_path / "root")


@pytest.fixture
def rewriting(jobs: Jobs, tmp_path: Path) -> Rewriting:
    return Rewriting(jobs, tmp_path)
