"""Balances captions over concepts, as MetaCLIP does (Xu et al. 2023, arXiv:2309.16671).

An **entry** is a word or a few words; a caption **matches** it where it holds the entry between spaces.  An entry with
n matches keeps each of them with the probability min(1, t / n), and a sample stays if any of its entries keeps it: with
the probability 1 − Π (1 − p) over its entries.  One draw for each sample decides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.balance.rows import Balanced, BalanceRows, KeptUids, draws
from curation.errors import SampleError, UsageError
from curation.jsonio import clean_text, decode_text, parse_json
from curation.reshard.uids import UID_DTYPE, Uids
from curation.storage.files import read_given

MAX_FILE_BYTES = 1 << 30
MAX_ENTRIES = 10_000_000
MAX_ENTRY_CHARS = 1000
_SPACED = str.maketrans({**{mark: f" {mark} " for mark in ",.;:?!`"}, **dict.fromkeys("\t\n\r", " ")})


def spaced(text: str) -> str:
    """The text as MetaCLIP looks for entries in it: punctuation between spaces, and a space at both ends."""
    return f" {text} ".translate(_SPACED)


class Entries:
    """The user's entries.

    An entry between spaces lies in a spaced text exactly where its words, split at single spaces, follow one another
    there.  So each run of words is looked up that begins an entry.
    """

    def __init__(self, names: list[str]) -> None:
        """names: without doubles and empty ones."""
        self.names = names
        self._runs: dict[str, int] = {}  # the first words of an entry → -1, and the whole entry → its number
        for name in names:
            place = name.find(" ")
            while place >= 0:
                self._runs.setdefault(name[:place], -1)
                place = name.find(" ", place + 1)
        self._runs.update({name: number for number, name in enumerate(names)})

    def __len__(self) -> int:
        return len(self.names)

    def of(self, caption: str) -> list[int]:
        """The numbers of the entries that a caption matches, each once, in order."""
        words = spaced(caption).split(" ")[1:-1]
        get, found = self._runs.get, set()
        for start, run in enumerate(words):
            number, end = get(run), start + 1
            while number is not None:
                if number >= 0:
                    found.add(number)
                if end == len(words):
                    break
                run = f"{run} {words[end]}"
                number, end = get(run), end + 1
        return sorted(found)


def read_entries(path: Path) -> Entries:
    """Reads a file of entries: one a line, or a JSON list of texts as MetaCLIP's ``metadata.json`` is.

    Raises:
        UsageError: It is neither, or too large.
    """
    data = read_given(f"--entries {path}", path, MAX_FILE_BYTES)
    if data.lstrip()[:1] in (b"[", b"{"):
        try:
            told = parse_json(data, MAX_FILE_BYTES)
        except SampleError as error:
            raise UsageError(f"--entries {path}: is no JSON list: {error}") from None
        if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
            raise UsageError(f"--entries {path}: a JSON list of texts is wanted")
    else:
        told = [line.strip() for line in decode_text(data).splitlines()]
    names = list(dict.fromkeys(name for name in told if name))
    if not names or len(names) > MAX_ENTRIES:
        raise UsageError(f"--entries {path}: has {len(names):,} entries; 1 to {MAX_ENTRIES:,} are wanted")
    if (longest := max(names, key=len)) and len(longest) > MAX_ENTRY_CHARS:
        shown = clean_text(longest[:60])
        raise UsageError(f"--entries {path}: an entry has more than {MAX_ENTRY_CHARS:,} characters: {shown!r}…")
    return Entries(names)


def balance_concepts(rows: BalanceRows, entries: Entries, most: int, seed: int, scratch: Path) -> Balanced:
    """Chooses the rows that stay.

    Args:
        rows: The rows.
        entries: The user's.
        most: MetaCLIP's t, the number of matches up to which an entry keeps all of them.
        seed: Of the draws.
        scratch: A folder for the matches of each row.

    Returns:
        The uids that stay, and the matches of each entry before and after.
    """
    before = np.zeros(len(entries), np.int64)
    after = np.zeros(len(entries), np.int64)
    spool = scratch / "matches.bin"
    unmatched = _match(rows, entries, spool, before)
    if rows.counts["balanced"] and not before.any():
        raise UsageError(
            f"--entries: none of {len(entries):,}, such as {clean_text(entries.names[0][:60])!r}, stands in a caption "
            "(upper and lower case are different), so no sample would stay"
        )
    keeps = np.minimum(1.0, most / np.maximum(before, 1))
    kept = KeptUids(scratch / "kept.parquet")
    try:
        for uids, counts, numbers in _spooled(spool):
            stays = draws(uids, seed) < _probabilities(keeps, counts, numbers)
            kept.add(uids[stays])
            after += np.bincount(numbers[np.repeat(stays, counts)], minlength=len(entries))
    finally:
        kept.close()
    spool.unlink()
    order = np.lexsort((np.arange(len(entries)), -before))[: int((before > 0).sum())]
    told = {
        "entries": len(entries),
        "entries_without_match": int((before == 0).sum()),
        "entries_above": int((before > most).sum()),
        "max_matches": most,
        "rows_without_match": unmatched,
        "matches_before": int(before.sum()),
        "matches_after": int(after.sum()),
    }
    report: dict[str, Any] = {
        "entry": [entries.names[number] for number in order],
        "before": before[order],
        "probability": keeps[order],
        "after": after[order],
    }
    return Balanced(kept.path, told, report)


def _match(rows: BalanceRows, entries: Entries, spool: Path, before: NDArray[np.int64]) -> int:
    """Spools the matches of each row that has some, and counts those of each entry.  Returns how many have none."""
    unmatched = 0
    with open(spool, "wb") as file:
        for uids, captions in rows.with_captions():
            found = [entries.of(caption) if caption else [] for caption in captions]
            counts = np.array([len(one) for one in found], np.uint32)
            numbers = np.array([number for one in found for number in one], np.uint32)
            matched = counts > 0
            unmatched += int((~matched).sum())
            before += np.bincount(numbers, minlength=len(before))
            if matched.any():
                file.write(np.array([matched.sum(), len(numbers)], "<u8").tobytes())
                for part in (np.ascontiguousarray(uids[matched], UID_DTYPE), counts[matched], numbers):
                    file.write(part.tobytes())
    return unmatched


def _spooled(spool: Path) -> Iterator[tuple[Uids, NDArray[np.uint32], NDArray[np.uint32]]]:
    """Yields blocks: the uids of rows, how many entries each matches, and the numbers of these, row by row."""
    with open(spool, "rb") as file:
        while sizes := file.read(16):
            rows, numbers = np.frombuffer(sizes, "<u8").tolist()
            yield (
                np.frombuffer(file.read(rows * np.dtype(UID_DTYPE).itemsize), UID_DTYPE),
                np.frombuffer(file.read(rows * 4), np.uint32),
                np.frombuffer(file.read(numbers * 4), np.uint32),
            )


def _probabilities(
    keeps: NDArray[np.float64], counts: NDArray[np.uint32], numbers: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """With which each row stays."""
    starts = np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])
    found: NDArray[np.float64] = 1.0 - np.multiply.reduceat(1.0 - keeps[numbers], starts)
    return found
