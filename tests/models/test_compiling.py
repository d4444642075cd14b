"""``torch.compile`` in the stages: the folder for compiled code, the short try at the start, and whose fault it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from curation.errors import InfrastructureError
from curation.models import compiling

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    from torch._inductor import config

    with config.patch(deterministic=False):
        yield


def places() -> tuple[Path, Path]:
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), Path(os.environ["TRITON_CACHE_DIR"])


def test_compiled_code_lies_beside_the_output_for_workers_of_one_kind(tmp_path: Path) -> None:
    output = tmp_path / "edits"
    found = []
    for kind in ("H100 80 GiB", "H100 80 GiB", "A100 40 GiB"):
        assert compiling.set_up(output, kind)
        found.append(places())
    assert found[0] == found[1] != found[2], "torch's own folder for triton has the device's number in its name"
    for inductor, triton in found:
        assert inductor.parent == output / "_compile_cache" and triton == inductor / "triton"
    assert stat.S_IMODE((output / "_compile_cache").stat().st_mode) == 0o700
    assert all(name.startswith("_") for name in os.listdir(output))


def test_the_kernels_are_chosen_without_trials_but_for_max(tmp_path: Path) -> None:
    from torch._inductor import config

    assert compiling.set_up(None, "cpu") and config.deterministic
    assert not compiling.set_up(None, "cpu", by_timing=True) and not config.deterministic
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_torch_without_that_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config", object())
    assert not compiling.set_up(None, "cpu")


@pytest.mark.parametrize("how", ["for the group", "a link", "another user's", "a file", "no locks"])
def test_code_is_not_executed_from_where_others_may_have_put_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "_compile_cache"
    if how == "for the group":
        folder.mkdir()
        folder.chmod(0o770)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif how == "another user's":
        folder.mkdir(0o700)
        user = os.geteuid()
        monkeypatch.setattr("curation.models.compiling.os.geteuid", lambda: user + 1)
    elif how == "a file":
        folder.write_bytes(b"")
    else:

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("curation.models.compiling.fcntl.flock", refuse)
    compiling.set_up(tmp_path, "cpu")
    inductor, triton = places()
    assert tmp_path not in inductor.parents and tmp_path not in triton.parents
    assert stat.S_IMODE(inductor.parent.stat().st_mode) == 0o700
    assert str(folder) in caplog.text and "until this process ends" in caplog.text


def test_a_folder_that_the_user_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    compiling.set_up(tmp_path / "output", "cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert "TRITON_CACHE_DIR" not in os.environ and not (tmp_path / "output").exists()


def test_the_try_at_the_start_tells_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that is not there, really looked for."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    expected = r"^sd-turbo cannot be compiled here \(InvalidCxxCompiler: .*/nowhere/g\+\+.*\); use --compile none$"
    # monkeypatch would leave the setting hidden from the tests that come later in this process
    nowhere = config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with nowhere, pytest.raises(InfrastructureError, match=expected) as caught:
        compiling.try_out("cpu", "sd-turbo")
    assert "\n" not in str(caught.value)


def test_whose_fault_an_error_is() -> None:
    """An assertion in the code that keeps captured graphs has no type of its own: where it was raised tells."""
    code = compile("assert is_key_in_tls()", "/lib/torch/_inductor/cudagraph_trees.py", "exec")
    with pytest.raises(AssertionError) as caught:  # as torch 2.6 has it in a thread that did not compile
        exec(code, {"is_key_in_tls": lambda: False})
    found = compiling.compiler_error(caught.value, "florence2")
    assert found is not None and str(found).startswith("florence2 cannot be compiled here (AssertionError")
    for error in (RuntimeError("CUDA error: device-side assert triggered"), ValueError("a bug"), AssertionError()):
        assert compiling.compiler_error(error, "florence2") is None
    assert compiling.compiler_error(RuntimeError("CUDA error: x"), "florence2", always=True) is None
    old = ImportError("No module named 'triton'")
    assert "No module named 'triton'" in str(compiling.compiler_error(old, "florence2", always=True))
