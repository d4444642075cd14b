"""Stage 04 on random roots: samples of many forms, some doubled or harmed, with members that belong to none, and edits.

Each shard is read back by the stage (``--verify``), proved by ``curation verify`` where that can be, and read to its
end by Python's tarfile.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.__main__ import main as command
from curation.reshard.uids import UID_DTYPE
from tests.tar.test_runs import harm
from tests.tar.test_splice import FOREIGN, member
from tests.test_nested_shards import run

FORMS: list[tuple[str, ...]] = [("jpg", "txt", "json")] * 6
FORMS += [("jpg", "json"), ("webp", "json", "txt"), ("jpg", "png", "json"), ("0.jpg", "1.jpg", "json")]
FORMS += [("JPG", "JSON", "txt"), ("json", "txt")]


@cache
def picture(seed: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (seed * 7 % 256, seed % 256, 3)).save(file, kind)
    return file.getvalue()


def data_of(suffix: str, key: str, uid: str) -> bytes:
    if suffix.lower() == "json":
        return json.dumps({"uid": uid, "caption": "x", "key": key}).encode()
    if suffix == "txt":
        return b"a caption"
    return picture(int(key) % 50, "WEBP" if suffix == "webp" else "JPEG")


def edit_of(key: str, uid: str) -> bytes:
    jpg = picture(200 + int(key) % 50)
    told = {
        "uid": uid,
        "caption": "x",
        "key": key,
        "sha256": hashlib.sha256(jpg).hexdigest(),
        "width": 16,
        "height": 16,
    }
    return member(f"{key}.jpg", jpg) + member(f"{key}.txt", b"x") + member(f"{key}.json", json.dumps(told).encode())


def make_shard(dice: random.Random, number: int) -> tuple[bytes, list[tuple[str, str]], bool]:
    """The bytes of a shard, the key and the uid of its samples, and whether it is as it was written."""
    parts, samples = [], []
    for sample in range(dice.randint(1, 12)):
        key, uid, form = f"{number}{sample:03d}", f"{dice.getrandbits(128):032x}", dice.choice(FORMS)
        samples.append((key, uid))
        for _ in range(dice.choice((1,) * 8 + (2, 3))):
            for suffix in form:
                parts += [member(dice.choice(FOREIGN))] if dice.random() < 0.05 else []
                parts.append(member(f"{key}.{suffix}", data_of(suffix, key, uid)))
    whole = dice.random() < 0.6
    if not whole and dice.random() < 0.4:
        parts.insert(dice.randrange(len(parts)), dice.choice(parts))
    data = b"".join(parts) + bytes(dice.choice((1024, 10240)) if whole else 0)
    is_harmed = not whole and len(data) > 20_000 and dice.random() < 0.7  # else it could lose all its bytes
    return harm(data, dice) if is_harmed else data, samples, whole


def random_flags(dice: random.Random, root: Path, uids: list[str]) -> list[str]:
    flags = ["--index"] if dice.random() < 0.4 else []
    if dice.random() < 0.3:
        flags += ["--shard_size", dice.choice(("1", "3", "5", "100"))]
        flags += ["--shuffle_buffer", "7"] if dice.random() < 0.5 else []
    if dice.random() < 0.3:
        flags += ["--image_suffix", dice.choice(("jpg", "keep", "webp", "png", "source"))]
    chosen = [uid for uid in uids if dice.random() < 0.7]
    if chosen and dice.random() < 0.25:
        chosen = sorted(chosen + [uid for uid in chosen if dice.random() < 0.2])
        np.save(root / "subset.npy", np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in chosen], UID_DTYPE))
        flags += ["--subset", str(root / "subset.npy")]
        flags += ["--keys", "datacomp"] if dice.random() < 0.5 else []
    return flags


@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 1500), marks=pytest.mark.soak)], ids=["few", "many"]
)
def test_every_shard_is_its_source_with_the_edits(
    seeds: range, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proved = 0
    for seed in seeds:
        dice, root = random.Random(seed), tmp_path / str(seed)
        (root / "shards").mkdir(parents=True)
        (root / "edits").mkdir()
        uids, foreign = list[str](), {}
        for number in range(dice.randint(1, 3)):
            data, samples, whole = make_shard(dice, number)
            (root / f"shards/{number}.tar").write_bytes(data)
            edits = b"".join(edit_of(*sample) for sample in samples if dice.random() < 0.3)
            (root / f"edits/{number}.tar").write_bytes(edits + bytes(1024))
            uids += [uid for _, uid in samples]
            if whole:
                foreign[number] = [name for name in names_in(root / f"shards/{number}.tar") if "." not in name]
        flags = random_flags(dice, root, uids)
        given = ["--input", f"{root}/shards", "--edits", f"{root}/edits", "--output", f"{root}/hybrid"]
        code = run("04_reshard", *given, "--verify", "--quiet", *flags)
        said = capsys.readouterr()
        assert code in (0, 1), (seed, flags, said)  # 1: a shard that is too badly harmed has failed
        assert "not what" not in said.err, (seed, flags, said)
        names = {path.stem: names_in(path) for path in (root / "hybrid").glob("*.tar")}
        if code == 0 and not {"--shard_size", "--subset"} & {*flags}:
            proof = ["verify", f"{root}/shards", f"{root}/hybrid", "--no_provenance", "--workers", "1", "--quiet"]
            assert command(proof) == 0, (seed, flags, capsys.readouterr())
            for number, wanted in foreign.items():
                assert [name for name in names[str(number)] if "." not in name] == wanted, (seed, flags)
            proved += 1
    assert proved > len(seeds) // 5


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [info.name for info in tar]
