"""Weights by URL, path and hub id, against real servers: checked, fetched once, gone on with, never half there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.errors import InfrastructureError, UsageError
from curation.models import weights
from curation.models.weights import cached, fetch_weights
from curation.storage.retry import RetryPolicy
from tests import ROOT, processes
from tests.processes import ended_at_last
from tests.servers.files import FileServer, Served, file_server
from tests.servers.hub import Model, serve

CONTENT = os.urandom(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(weights, "RETRIES", RetryPolicy(tries=4, first_wait_s=0.01))
    with file_server() as server:
        server.add("release/scrfd.pt", CONTENT)
        yield server


def served(files: FileServer) -> Served:
    return files.files["/release/scrfd.pt"]


def fetch(files: FileServer, cache: Path, sha256: str | None = SHA256, **more: int) -> Path:
    return fetch_weights(f"{files.url}/release/scrfd.pt", sha256, cache, **more)


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_a_url_is_downloaded_once_and_checked_on_every_use(files: FileServer, tmp_path: Path) -> None:
    path = fetch(files, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert path == cached(f"{files.url}/release/scrfd.pt", SHA256, tmp_path / "cache")
    assert path.suffix == ".pt"
    assert fetch(files, tmp_path / "cache", SHA256.upper()) == path
    assert fetch_weights(f"{files.url}/release/scrfd.pt#sha256={SHA256}", None, tmp_path / "cache") == path
    assert len(served(files).asked) == 1
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert fetch(files, tmp_path / "cache").read_bytes() == CONTENT, "a damaged file in the cache is fetched anew"
    assert len(served(files).asked) == 2
    assert left(tmp_path / "cache") == [path.name]


def test_another_sha256_keeps_nothing(files: FileServer, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=f"its sha256 is {SHA256}, not {'0' * 64}"):
        fetch(files, tmp_path, "0" * 64)
    assert left(tmp_path) == []


def test_a_url_needs_a_sha256_that_is_one(files: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the sha256"):
        fetch(files, tmp_path, None)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        fetch(files, tmp_path, "abc")
    assert served(files).asked == []


def test_a_cut_download_goes_on_where_it_broke_off(files: FileServer, tmp_path: Path) -> None:
    served(files).next_cuts = [1 << 20, 1 << 20]
    assert fetch(files, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in served(files).asked] == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]


def test_a_later_start_goes_on_where_an_earlier_one_gave_up(files: FileServer, tmp_path: Path) -> None:
    served(files).next_cuts = [1 << 20, 0, 0, 0]
    with pytest.raises(InfrastructureError, match=r"broke off at byte 1,048,576 of 3,145,728, .*; start again"):
        fetch(files, tmp_path)
    assert len(left(tmp_path)) == 1
    assert left(tmp_path)[0].endswith(".part")
    served(files).asked.clear()
    assert fetch(files, tmp_path).read_bytes() == CONTENT
    assert served(files).asked[0][1] == f"bytes={1 << 20}-"
    assert len(left(tmp_path)) == 1


def test_a_server_without_ranges_is_asked_for_everything_again(files: FileServer, tmp_path: Path) -> None:
    served(files).next_cuts, served(files).ranges = [1 << 20], False
    assert fetch(files, tmp_path).read_bytes() == CONTENT
    assert len(served(files).asked) == 2


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "remains", [CONTENT[:9] + b"x" * 1000, CONTENT + b"more", CONTENT], ids=["other", "long", "all"]
)
def test_what_an_attempt_left_is_no_ground_for_trust(
    remains: bytes, ranges: bool, files: FileServer, tmp_path: Path
) -> None:
    served(files).ranges = ranges
    path = cached(f"{files.url}/release/scrfd.pt", SHA256, tmp_path)
    path.with_name(f".{path.name}.part").write_bytes(remains)
    assert fetch(files, tmp_path).read_bytes() == CONTENT
    assert left(tmp_path) == [path.name]


@pytest.mark.parametrize("states_length", [True, False])
def test_a_file_that_is_too_large_is_refused(states_length: bool, files: FileServer, tmp_path: Path) -> None:
    served(files).length = states_length
    with pytest.raises(InfrastructureError, match=r"more than 2\.0 MB"):
        fetch(files, tmp_path, max_bytes=2_000_000)
    assert left(tmp_path) == []


def test_no_server_and_no_file_are_one_clear_line_without_secrets(files: FileServer, tmp_path: Path) -> None:
    for url in ("http://user:secret@127.0.0.1:9/w.pt?signature=secret", f"{files.url}/none.pt?signature=secret"):
        with pytest.raises(InfrastructureError, match="cannot be fetched") as caught:
            fetch_weights(url, SHA256, tmp_path)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


FETCH = """
import sys
from pathlib import Path
from curation.models.weights import fetch_weights
print(fetch_weights(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
"""


def test_four_processes_at_once_are_one_download(files: FileServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FETCH, f"{files.url}/release/scrfd.pt", SHA256, str(tmp_path / "cache")]
    with ended_at_last(*(processes.start(command, stdout=subprocess.PIPE) for _ in range(4))) as four:
        said = {process.communicate(timeout=120)[0].strip() for process in four}
    assert [process.returncode for process in four] == [0] * 4
    assert len(said) == 1
    assert Path(said.pop()).read_bytes() == CONTENT
    assert len(served(files).asked) == 1
    assert len(left(tmp_path / "cache")) == 1


def test_a_filesystem_without_locks(files: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert fetch(files, tmp_path).read_bytes() == CONTENT
    assert [name for name in left(tmp_path) if not name.endswith(".part")] == left(tmp_path)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "head.pt"
    file.write_bytes(CONTENT)
    assert fetch_weights(str(file), None, tmp_path / "cache") == file
    assert fetch_weights(str(file), SHA256, tmp_path / "cache") == file
    with pytest.raises(InfrastructureError, match="its sha256 is"):
        fetch_weights(str(file), "0" * 64, tmp_path / "cache")
    with pytest.raises(UsageError, match="is of one file"):
        fetch_weights(str(tmp_path), SHA256, tmp_path / "cache")
    with pytest.raises(InfrastructureError, match=r"head .*: no such file"):
        fetch_weights(str(tmp_path / "none.pt"), None, tmp_path / "cache", name="head")
    assert not (tmp_path / "cache").exists()


HUB = """
import sys
from pathlib import Path
from curation.models.weights import fetch_weights
for source in sys.argv[2:]:
    print(fetch_weights(source, None, Path(sys.argv[1])))
"""


def test_hub_ids_give_a_folder_or_one_file_without_pickles(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "code.py"):
        (model / name).write_bytes(name.encode())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    sources = ["some/clip", "some/clip@main:code.py", f"some/clip@{'c' * 40}"]
    command = [sys.executable, "-c", HUB, str(tmp_path / "cache")]
    with serve({"some/clip": Model(model)}) as hub:
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run([*command, *sources], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder, file, same = map(Path, done.stdout.split())
        assert same == folder
        assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "code.py"}
        assert file.read_bytes() == b"code.py"
        done = subprocess.run([*command, "some/other"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert "some/other: no such folder, and the hub shows no such model" in done.stderr.splitlines()[-1]
    done = subprocess.run([*command, *sources], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(folder), str(file), str(folder)], "once fetched, no hub is needed"
