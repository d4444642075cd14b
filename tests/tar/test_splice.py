"""Edited samples between members that belong to no sample, and samples that come several times in a row."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

from curation.tar.headers import make_header, padding
from curation.tar.prove import prove_splice
from curation.tar.scan import SampleSpan, TarScan
from curation.tar.splice import Action, Copies, Decision, Edit, decided, splice
from tests.tar.test_runs import Kept

FOREIGN = ("dir/", "README")
FORMS = (("jpg", "txt", "json"), ("jpg", "txt"), ("jpg",), ("txt", "json"), ("jpg", "png", "txt"), ("0.jpg", "1.jpg"))
EDITS = {
    "edit": Edit(b"new" * 90, b"text", b"{}"),
    "one picture of several": Edit(b"new" * 90, b"text", b"{}", b"0.jpg", replaces="0.jpg"),
    "a member more": Edit(None, b"text", None, more={"short.txt": b"short", "png": None}),
}


def member(name: str, data: bytes = b"") -> bytes:
    return make_header(name, len(data), 1_700_000_000) + data + padding(len(data))


def shard(dice: random.Random) -> bytes:
    """Samples of many forms, some of them several times in a row, with members without a key anywhere."""
    parts = []
    for key in "abcd":
        form = dice.choice(FORMS)
        for _ in range(dice.choice((1, 1, 2, 3))):
            for suffix in form:
                parts += [member(name) for name in FOREIGN if dice.random() < 0.1]
                parts.append(member(f"{key}.{suffix}", f"{key} {suffix}".encode() * dice.randint(0, 40)))
            parts += [member(name) for name in FOREIGN if dice.random() < 0.15]
    return b"".join(parts) + bytes(10240)


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [info.name for info in tar]


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "under other keys"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_members_without_a_key_stay_beside_edited_samples(edit: Edit, copies: bool, tmp_path: Path) -> None:
    dice = random.Random(5)
    source, result = tmp_path / "source.tar", tmp_path / "result.tar"
    met = 0
    for number in range(150):
        source.write_bytes(shard(dice))
        edited = set(dice.sample("abcd", 2))

        def decide(span: SampleSpan, edited: set[str] = edited) -> Decision:
            if span.torn or span.refused:
                return Action.DROP
            if span.key not in edited:
                return Action.KEEP
            return Copies((f"{span.key}-0", f"{span.key}-1"), edit) if copies else edit

        target = Kept()
        splice(decided(TarScan(source), decide), target)
        result.write_bytes(target.data)
        proof = prove_splice(decided(TarScan(source), decide), result)
        assert proof.equal and not proof.readers, (number, proof)
        foreign = [name for name in names_in(source) if "." not in name]
        assert [name for name in names_in(result) if "." not in name] == foreign, number
        met += len(foreign)
    assert met > 100
