"""Files that a newer receipt no longer names: they go, and never cost the newest receipt a file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curation.run.commit import Commit, has_obsolete_outputs, remove_obsolete
from curation.storage.files import AtomicFile, Published
from tests.run.toy_runs import Place

SHARD = "00000001"


def publish(root: Path, token: str, generation: int, *paths: str, superseded: tuple[str, ...] = ()) -> dict[str, Any]:
    """A real commit of files that hold their attempt's token."""
    outputs = []
    for path in paths:
        with AtomicFile(root / path, token) as file:
            file.write(token.encode())
        outputs.append(Published(path, file.temporary.name, file.size, file.digest))
    receipt = {
        "token": token,
        "generation": generation,
        "status": "done",
        "outputs": [{"path": o.path, "temporary": o.temporary, "size": o.size, "digest": o.digest} for o in outputs],
        "superseded": list(superseded),
    }
    commit_of(root).write(receipt)
    return receipt


def commit_of(root: Path) -> Commit:
    return Commit(root, root / "_receipts", SHARD)


def files(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(root.iterdir()) if path.is_file()}


class Meanwhile(Commit):
    """Another attempt commits right after the remover has read that its receipt is the newest."""

    then: Callable[[], object] | None = None

    def read_receipt(self) -> dict[str, Any] | None:
        receipt, then = super().read_receipt(), self.then
        self.then = None
        if then is not None:
            then()
        return receipt


def test_a_newer_receipts_file_of_the_same_name_is_put_back(tmp_path: Path) -> None:
    publish(tmp_path, "a", 1, "A", "B")
    mine = publish(tmp_path, "b", 2, "A", superseded=("B",))
    commit = Meanwhile(tmp_path, tmp_path / "_receipts", SHARD)
    commit.then = lambda: publish(tmp_path, "c", 3, "A", "B")
    remove_obsolete(tmp_path, commit, mine, "b")
    assert files(tmp_path) == {"A": "c", "B": "c"}


def test_what_a_newer_commit_under_way_has_put_there_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "a", 1, "A", "B")
    mine = publish(tmp_path, "b", 2, "A", superseded=("B",))

    class Killed(BaseException):
        pass

    def half() -> None:
        """Killed when its outputs are in their places, and its receipt is not."""
        rename = os.rename

        def killed(source: Any, target: Any) -> None:
            if str(target).endswith(".json"):
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "rename", killed)
            publish(tmp_path, "c", 3, "A", "B")

    commit = Meanwhile(tmp_path, tmp_path / "_receipts", SHARD)
    commit.then = half
    remove_obsolete(tmp_path, commit, mine, "b")
    assert files(tmp_path) == {"A": "c", "B": "c"}
    assert commit_of(tmp_path).finish_pending(2)
    assert files(tmp_path) == {"A": "c", "B": "c"}


def test_a_newer_receipt_that_does_not_name_it_either(tmp_path: Path) -> None:
    publish(tmp_path, "a", 1, "A", "B")
    mine = publish(tmp_path, "b", 2, "A", superseded=("B",))
    commit = Meanwhile(tmp_path, tmp_path / "_receipts", SHARD)
    commit.then = lambda: publish(tmp_path, "c", 3, "A", superseded=("B",))
    remove_obsolete(tmp_path, commit, mine, "b")
    assert files(tmp_path) == {"A": "c"}


def test_what_the_dead_had_put_aside(tmp_path: Path) -> None:
    """One was killed when it had just put aside what turned out to be the newest receipt's, another what was not."""
    publish(tmp_path, "a", 1, "A", "B")
    mine = publish(tmp_path, "b", 2, "A", superseded=("B", "C"))
    os.rename(tmp_path / "B", tmp_path / ".B.dead.old")
    (tmp_path / ".C.gone.old").write_text("x")
    assert not has_obsolete_outputs(tmp_path, mine)
    remove_obsolete(tmp_path, commit_of(tmp_path), mine, "s", ["dead", "gone", "unheard-of"])
    assert files(tmp_path) == {"A": "b"}
    newest = publish(tmp_path, "c", 3, "B", superseded=("A",))
    assert has_obsolete_outputs(tmp_path, newest)
    remove_obsolete(tmp_path, commit_of(tmp_path), mine, "b", ["dead"])
    assert files(tmp_path) == {"A": "b", "B": "c"}, "an older receipt is no reason to remove anything"


def test_a_run_removes_what_a_shard_without_a_claim_superseded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The winner's record was finished by one that took its claim over and gave it back; then the winner died."""
    place.shard("1", "keep", "keep")
    place.shard("2", "keep")
    assert place.run() == 0
    place.shard("1", "drop", "drop")
    with monkeypatch.context() as patch:
        patch.setattr("curation.run.attempt.Attempts._clear_away", lambda *arguments: None)
        assert place.run() == 0
    assert "1.txt" in place.receipt("1")["superseded"]
    assert (place.out / "1.txt").exists()
    assert not list(place.out.glob("_claims/toy/*/*.claim"))
    before = place.receipts()
    place.forget_journal()
    assert place.run() == 0
    assert not (place.out / "1.txt").exists()
    assert (place.out / "2.txt").exists()
    assert place.receipts() == before
    assert place.lines("open") == []
    assert place.litter() == []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
