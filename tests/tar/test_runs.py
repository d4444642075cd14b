"""Runs of samples that are alike: the fast way through a shard finds exactly what the careful one finds."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from curation.errors import ShardError
from curation.tar import blocks, runs, scan
from curation.tar.headers import BLOCK, make_header, padding
from curation.tar.prove import prove_splice
from curation.tar.scan import Run, SampleSpan, TarReport, TarScan
from curation.tar.splice import Action, DecidedWindow, decided, splice

KEYS = [f"{number:08x}" for number in range(40)]
Shard = Callable[[random.Random], bytes]


def member(name: str, data: bytes, mtime: int = 1_700_000_000) -> bytes:
    return make_header(name, len(data), mtime) + data + padding(len(data))


def plain(dice: random.Random, keys: list[str] = KEYS, suffixes: tuple[str, ...] = ("jpg", "json", "txt")) -> bytes:
    return b"".join(
        member(f"{key}.{suffix}", dice.randbytes(dice.randint(0, 1500)), 1_700_000_000 + number // 7)
        for number, key in enumerate(keys)
        for suffix in suffixes
    )


def by_tarfile(form: int) -> Shard:
    def make(dice: random.Random) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for key in KEYS:
                for suffix in ("jpg", "txt"):
                    info = tarfile.TarInfo(f"folder/{key}.{suffix}")
                    data = dice.randbytes(dice.randint(0, 900))
                    info.size, info.mtime, info.uid = len(data), 1.5 if key == KEYS[9] else 3, 1000
                    tar.addfile(info, io.BytesIO(data))
        return file.getvalue()

    return make


def mixed(dice: random.Random) -> bytes:
    """Samples with other members, other owners, a folder, a long key, a key twice, and keys in a row."""
    data = plain(dice, KEYS[:9]) + plain(dice, KEYS[9:12], ("png", "txt")) + plain(dice, KEYS[12:20])
    data += member("a folder/", b"") + plain(dice, KEYS[20:24]) + plain(dice, ["k" * 97, "k" * 96, "k" * 95])
    data += (
        plain(dice, KEYS[:2])
        + plain(dice, [KEYS[1], "x", "x", "y", "y", "y"])
        + plain(dice, ["", "a/", "a/b", "c.d/e"])
    )
    return data + plain(dice, KEYS[24:], ("jpg", "JSON", "txt")) + plain(dice, ["ä", "\udcff", "z"])


def stored(dice: random.Random) -> bytes:
    """Members that hold headers themselves: a stored tar, and a lone magic at a header's place."""
    inside = plain(dice, KEYS[:3]) + bytes(1024)
    magic = bytes(BLOCK + 257) + b"ustar\x0000" + bytes(500)
    parts = [plain(dice, [key], ("jpg", "txt")) for key in KEYS[:30]]
    parts[7] = member(f"{KEYS[7]}.jpg", inside) + member(f"{KEYS[7]}.txt", b"t")
    parts[19] = member(f"{KEYS[19]}.jpg", b"j") + member(f"{KEYS[19]}.txt", magic)
    return b"".join(parts)


def by_webdataset(dice: random.Random, keys: list[str] = KEYS[:16]) -> bytes:
    """As ``webdataset.TarWriter`` writes: each member has a pax header with its time, which is no whole number."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, key in enumerate(keys):
            for suffix in ("jpg", "json", "txt"):
                info, data = tarfile.TarInfo(f"{key}.{suffix}"), dice.randbytes(dice.randint(0, 1500))
                info.size, info.mtime, info.mode = len(data), 1_700_000_000 + number // 3 + dice.random(), 0o444
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()  # without the end of the archive


def with_pax(name: str, data: bytes, body: bytes, *, announced: int | None = None, kind: bytes = b"x") -> bytes:
    """A member behind a pax header with any text.  announced: how many bytes the block before says that it has."""
    block = bytearray(make_header("././@PaxHeader", len(body) if announced is None else announced))
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + body + padding(len(body)) + member(name, data)


def records(**values: str) -> bytes:
    """The text of a pax header."""
    told = b""
    for keyword, value in values.items():
        rest = f" {keyword}={value}\n".encode()
        size = next(size for size in range(len(rest), len(rest) + 5) if len(str(size)) + len(rest) == size)
        told += b"%d" % size + rest
    return told


def other_kinds(dice: random.Random) -> bytes:
    """Samples of four members, and then of two: what the samples around damage have tells whether one was lost."""
    return plain(dice, KEYS[:30], ("jpg", "json", "txt", "cls")) + plain(dice, KEYS[30:], ("jpg", "txt"))


def with_globals(dice: random.Random) -> bytes:
    """Global headers between the samples."""
    text = records(comment="of all that come")
    block = bytearray(make_header("pax_global_header", len(text)))
    block[156:157] = b"g"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    parts = [plain(dice, KEYS[begin : begin + 8]) for begin in range(0, 40, 8)]
    return (bytes(block) + text + padding(len(text))).join(parts)


HOSTILE: dict[str, dict[str, object]] = {
    "a name": {"body": records(path="other.jpg")},
    "a name beside the time": {"body": records(mtime="1700000000.5", path="other.jpg")},
    "a size": {"body": records(size="7")},
    "a size beside the time": {"body": records(mtime="1700000000.5", size="7")},
    "two times": {"body": records(mtime="1700000000.5") + records(mtime="1600000000.5")},
    "another time": {"body": records(atime="1700000000.5")},
    "a comment": {"body": records(comment="1700000000.5")},
    "a character set": {"body": records(hdrcharset="BINARY")},
    "a hole": {"body": records(**{"GNU.sparse.major": "1"})},
    "a length that is too small": {"body": b"19 mtime=1700000000.5\n"},
    "a length that is too large": {"body": b"40 mtime=1700000000.5\n"},
    "a length with a zero in front": {"body": b"023 mtime=1700000000.5\n"},
    "no end of the line": {"body": b"22 mtime=1700000000.5"},
    "more is announced": {"body": records(mtime="1700000000.5"), "announced": 100},
    "less is announced": {"body": records(mtime="1700000000.5"), "announced": 10},
    "nothing is announced": {"body": records(mtime="1700000000.5"), "announced": 0},
    "text behind the record": {"body": records(mtime="1700000000.5") + bytes(20) + b"x", "announced": 22},
    "a time before 1970": {"body": records(mtime="-1.5")},
    "no number": {"body": records(mtime="1e9")},
    "no time": {"body": records(mtime="")},
    "a time of 19 digits": {"body": records(mtime="9" * 19)},
    "another kind": {"body": records(mtime="1700000000.5"), "kind": b"X"},
    "a global header": {"body": records(mtime="1700000000.5"), "kind": b"g"},
    "a long name": {"body": b"other.jpg\0", "kind": b"L"},
    "nothing": {"body": b""},
    "two blocks": {"body": records(mtime="1700000000." + "5" * 600)},
}


def hostile(dice: random.Random) -> bytes:
    """Between samples with their times in pax headers one whose pax header holds something else."""
    told = dice.choice(list(HOSTILE.values()))
    time = records(mtime=f"{dice.randint(0, 2_000_000_000)}.{dice.randint(0, 9_999_999)}")
    return b"".join(
        with_pax(f"{key}.{suffix}", dice.randbytes(dice.randint(0, 900)), time)
        if (number, suffix) != (20, "jpg")
        else with_pax(f"{key}.{suffix}", b"picture", **told)  # type: ignore[arg-type]
        for number, key in enumerate(KEYS)
        for suffix in ("jpg", "txt")
    )


SHARDS: dict[str, Shard] = {
    "webdataset": by_webdataset,
    "hostile": hostile,
    "plain": plain,
    "gnu": by_tarfile(tarfile.GNU_FORMAT),
    "pax": by_tarfile(tarfile.PAX_FORMAT),
    "mixed": mixed,
    "stored": stored,
    "globals": with_globals,
    "kinds": other_kinds,
}


def harm(data: bytes, dice: random.Random) -> bytes:
    """Damage at one to three places: bytes changed, lost or put in, of headers more often than of data."""
    broken = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(broken) // BLOCK) * BLOCK + dice.choice((0, dice.randrange(160), dice.randrange(BLOCK)))
        length = dice.choice((1, 8, BLOCK, 3 * BLOCK, dice.randint(1, 5000)))
        kind = dice.randrange(4)
        if kind == 0:
            broken[at : at + length] = dice.randbytes(len(broken[at : at + length]))
        elif kind == 1:
            del broken[at : at + length]
        elif kind == 2:
            broken[at:at] = dice.choice((dice.randbytes(length), bytes(length), bytes(broken[:length])))
        else:
            broken[at : at + 1] = dice.choice((b"\0", b".", b"/", b"8", b" ", b"_", b"\x80"))
    return bytes(broken)


def found(path: Path) -> object:
    """All that a scan tells of a shard."""
    report = TarReport()
    try:
        spans = [told(span) for window in TarScan(path, report, ahead=False).windows() for span in window.spans]
    except ShardError as error:
        return str(error)
    return spans, report.warnings(), report.samples, report.repeated_keys, report.doubled, report.odd_headers


def told(span: SampleSpan) -> object:
    own = (span.key, span.start, span.end, span.torn, span.refused, span.suspect, span.repeated, span.surplus)
    assert span.suffixes == tuple(member.suffix for member in span.members)
    assert span.alike is None or span.alike.suffixes == span.suffixes
    return own, span.verbatim, span.members, span.foreign, span.damages, span.own_extents, span.kinds


def careful(path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patch:
        patch.setattr(TarScan, "_run", lambda self, at: None)
        return found(path)


@pytest.mark.parametrize("window", [2 << 20, 8192], ids=["as it is", "small windows"])
@pytest.mark.parametrize("name", SHARDS)
def test_a_run_tells_what_the_careful_way_tells(
    name: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", window)
    dice, path = random.Random(name), tmp_path / "00000000.tar"
    for number in range(40):
        data = SHARDS[name](dice) + bytes(dice.choice((0, 512, 1024, 10240)))
        path.write_bytes(data if number < 3 else harm(data, dice))
        assert found(path) == careful(path, monkeypatch), number


class Kept:
    """A target that keeps what is written to it."""

    def __init__(self) -> None:
        self.data = b""

    def write_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.data += b"".join(pieces)


def in_runs(path: Path, left_out: set[str]) -> Iterator[DecidedWindow]:
    """Windows whose samples stay in runs, but for those that are left out."""
    for window in TarScan(path).windows():
        parts = [one for part in window.parts for one in (part.without(left_out) if isinstance(part, Run) else (part,))]
        yield (
            window,
            [
                (part, Action.KEEP)
                if isinstance(part, Run)
                else (part, Action.DROP if part.key in left_out else Action.KEEP)
                for part in parts
            ],
        )


@pytest.mark.parametrize("window", [2 << 20, 8192], ids=["as it is", "small windows"])
@pytest.mark.parametrize("name", SHARDS)
def test_runs_are_copied_and_proved_as_their_samples_are(
    name: str, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", window)
    dice, path, result = random.Random(name), tmp_path / "00000000.tar", tmp_path / "result.tar"
    for number in range(30):
        data = SHARDS[name](dice) + bytes(10240)
        path.write_bytes(data if number < 3 else harm(data, dice))
        left_out = set(dice.sample(KEYS, dice.choice((0, 1, 5, 20))))
        kept, indexes = [Kept(), Kept()], [list[tuple[str, int, int]]() for _ in range(2)]
        one_by_one = partial(decided, decide=lambda span: Action.DROP if span.key in left_out else Action.KEEP)  # noqa: B023
        for windows, target, index in zip(
            (one_by_one(TarScan(path)), in_runs(path, left_out)), kept, indexes, strict=True
        ):
            splice(windows, target, index)
        assert kept[0].data == kept[1].data, number
        assert indexes[0] == indexes[1], number
        result.write_bytes(kept[0].data)
        proof = prove_splice(in_runs(path, left_out), result)
        assert proof.equal, number
        assert proof == prove_splice(one_by_one(TarScan(path)), result), number
        result.write_bytes(kept[0].data[:-1] + b"x")
        assert not prove_splice(in_runs(path, left_out), result).equal, number


def test_a_run_has_no_key_that_an_earlier_sample_has(tmp_path: Path) -> None:
    keys = [f"{number:08d}" for number in range(500)]
    path = tmp_path / "00000000.tar"
    path.write_bytes(plain(random.Random(1), [*keys, *keys[:100:7], "last"]) + bytes(10240))
    report, met = TarReport(), list[str]()
    for window in TarScan(path, report).windows():
        for part in window.parts:
            if isinstance(part, Run):
                assert not {*part.keys} & {*met}
                assert len(part) == len({*part.keys}) == len(part.spans)
                assert [(span.key, span.start, span.end) for span in part.spans] == part.places
                met += part.keys
            else:
                assert part.repeated == (part.key in met)
                met.append(part.key)
    assert met == [*keys, *keys[:100:7], "last"]
    assert report.repeated_keys == len(keys[:100:7])


def test_nearly_all_samples_are_parsed_in_runs(tmp_path: Path) -> None:
    path = tmp_path / "00000000.tar"
    path.write_bytes(plain(random.Random(1), [f"{number:08d}" for number in range(3000)]) + bytes(10240))
    spans = [span for window in TarScan(path).windows() for span in window.spans]
    assert len(spans) == 3000
    assert sum(span.alike is not None for span in spans) == 2999, "only the first one is parsed by itself"
    parts = [part for window in TarScan(path).windows() for part in window.parts]
    blocks_read = -(-path.stat().st_size // blocks.READ_BYTES)
    assert sum(isinstance(part, SampleSpan) for part in parts) <= 1 + blocks_read, "the first, and the last of a block"


def test_times_in_pax_headers_are_parsed_in_runs(tmp_path: Path) -> None:
    path = tmp_path / "00000000.tar"
    path.write_bytes(by_webdataset(random.Random(1), [f"{number:08d}" for number in range(300)]) + bytes(10240))
    spans = [span for window in TarScan(path).windows() for span in window.spans]
    assert sum(span.alike is not None for span in spans) == len(spans) - 1 == 299
    with tarfile.open(path) as tar:
        read = [(info.name, info.offset_data, info.size, int(info.mtime)) for info in tar]
    members = [member for span in spans for member in span.members]
    assert [(member.text_name, member.data, member.size, member.mtime) for member in members] == read


@pytest.mark.parametrize("what", HOSTILE)
def test_other_pax_headers_are_parsed_by_the_careful_way(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, time = tmp_path / "00000000.tar", records(mtime="1700000000.5")
    parts = [with_pax(f"{key}.jpg", b"picture", time) for key in KEYS[:9]]
    parts[5] = with_pax(f"{KEYS[5]}.jpg", b"picture", **HOSTILE[what])  # type: ignore[arg-type]
    path.write_bytes(b"".join(parts) + bytes(10240))
    spans = {span.key: span for window in TarScan(path).windows() for span in window.spans}
    assert spans[KEYS[3]].alike is not None
    assert KEYS[5] not in spans or spans[KEYS[5]].alike is None
    assert found(path) == careful(path, monkeypatch)


def test_headers_in_every_member_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard whose members all hold a header's magic must not be parsed again from each of its samples on."""
    parsed = 0
    real = runs.run_of

    def counted(*arguments: object) -> tuple[list[runs.Row], runs.End]:
        nonlocal parsed
        parsed += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "run_of", counted)
    body = bytes(257) + b"ustar\x0000" + bytes(247)
    path = tmp_path / "00000000.tar"
    path.write_bytes(b"".join(member(f"{number:08d}.jpg", body) for number in range(2000)) + bytes(10240))
    assert len([span for window in TarScan(path).windows() for span in window.spans]) == 2000
    assert parsed <= 1 + -(-path.stat().st_size // blocks.READ_BYTES), "once a block"


@pytest.mark.parametrize("ahead", [True, False], ids=["a thread reads ahead", "no thread"])
def test_samples_of_any_size_keep_their_bytes(ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples smaller and larger than a block, than what is kept of one, and than what is skipped."""
    monkeypatch.setattr(blocks, "READ_BYTES", 4096)
    monkeypatch.setattr(blocks, "_USUALLY_KEPT_BYTES", 2048)
    monkeypatch.setattr(blocks, "MAX_KEPT_BYTES", 64 << 10)
    dice, path = random.Random(1), tmp_path / "00000000.tar"
    sizes = [dice.choice((10, 900, 5000, 12_000, 30_000, 70_000, 200_000)) for _ in KEYS]
    wanted = [(f"{key}.jpg", dice.randbytes(size)) for key, size in zip(KEYS, sizes, strict=True)]
    path.write_bytes(b"".join(member(*each) + member(each[0][:-3] + "txt", b"text") for each in wanted) + bytes(1024))
    found = [
        (span.members[0].text_name, window.read(span.members[0].data, span.members[0].size))
        for window in TarScan(path, ahead=ahead).windows()
        for span in window.spans
    ]
    assert found == wanted
