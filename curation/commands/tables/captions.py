"""Tests of captions that DataComp's baselines make and SQL cannot: their language, and whether they name a thing of
ImageNet.  They are those of DataComp's ``baselines/apply_filter.py``; none of them cleans the caption first.

A **text test** takes captions and says of each whether it passes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.tables.assets import import_nltk
from curation.errors import InfrastructureError, UsageError
from curation.language import LanguageIdentifier

TextTest = Callable[[Sequence[str]], NDArray[np.bool_]]
ENGLISH = "en"
_CLD3_MAX_BYTES = 1000  # as DataComp asks gcld3
_WORDS_KEPT = 1 << 18  # words whose answer is remembered: some 40 MB
_MAX_SYNSETS_BYTES = 16 << 20
_SYNSET = re.compile(r"[nvars][0-9]{8}")
_LEXICOGRAPHER_FILES = 45  # of WordNet 3.0 (lexnames(5WN)); nltk wants a name for each


def english_by_fasttext(model: Path) -> TextTest:
    """Whether the most probable language of the raw caption is English."""
    identifier = LanguageIdentifier(model)

    def test(captions: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([language == ENGLISH for language in identifier.identify_raw(captions)], bool)

    return test


def english_by_cld3() -> TextTest | None:
    """The same with gcld3; None where it is not installed."""
    try:
        import gcld3
    except ImportError:
        return None
    identifier: Any = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=_CLD3_MAX_BYTES)

    def test(captions: Sequence[str]) -> NDArray[np.bool_]:
        found = (identifier.FindLanguage(text=caption.replace("\n", " ")).language for caption in captions)
        return np.array([language == ENGLISH for language in found], bool)

    return test


def more_than_one_token(captions: Sequence[str]) -> NDArray[np.bool_]:
    """Whether fastText splits the raw caption into more than one token; a newline is one."""
    import fasttext

    return np.array([len(fasttext.tokenize(caption)) > 1 for caption in captions], bool)


def names_an_entity(wordnet: str, synsets: Path) -> TextTest:
    """Whether the first synset of a word of the caption is one of ``synsets``.

    Words are what ``str.split`` gives, and synsets are compared by their offset alone, as DataComp does: a verb's
    synset counts if a noun of the list has the same offset.

    Args:
        wordnet: A folder with WordNet 3.0.
        synsets: A file of lines such as ``n01440764``.

    Raises:
        InfrastructureError: One of them cannot be read, or is something else.
    """
    offsets = read_synsets(synsets)
    reader = _open_wordnet(wordnet)

    @lru_cache(_WORDS_KEPT)
    def is_entity(word: str) -> bool:
        found = reader.synsets(word)
        return bool(found) and found[0] in offsets

    def test(captions: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([any(map(is_entity, caption.split())) for caption in captions], bool)

    return test


def read_synsets(path: Path) -> frozenset[int]:
    """Returns the offsets of the synsets that a file lists.

    Raises:
        UsageError: It is no such list.
    """
    try:
        with open(path, encoding="ascii") as file:
            lines = file.read(_MAX_SYNSETS_BYTES).split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--synsets {path}: cannot be read: {error}") from None
    for line in lines:
        if not _SYNSET.fullmatch(line):
            raise UsageError(f"--synsets {path}: {line[:40]!r} is no synset; each line is one, such as n01440764")
    if not lines:
        raise UsageError(f"--synsets {path}: there is no synset in it")
    return frozenset(int(line[1:]) for line in lines)


def _open_wordnet(folder: str) -> Any:
    """nltk's reader of WordNet, whose synsets are their offsets alone: the files of synsets are not read, and memory
    does not grow."""
    import_nltk()
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            if file == "lexnames":  # Debian's package has none, and the names of these files do not matter here
                return io.StringIO(
                    "".join(f"{number:02d}\tfile.{number}\t1\n" for number in range(_LEXICOGRAPHER_FILES))
                )
            return super().open(file)

        def synset_from_pos_and_offset(self, pos: str, offset: int) -> int:
            return offset

        def map_wn(self, version: str = "wordnet") -> None:
            """Later versions of WordNet have a table of what 3.0 calls a synset."""

    if folder not in nltk.data.path:
        nltk.data.path.append(folder)  # nltk reads from no other folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it can read English only
            reader = Reader(folder, None)
        version = reader.get_version()
    except (OSError, LookupError, ValueError, WordNetError) as error:
        raise InfrastructureError(f"--wordnet {folder}: cannot be read: {error}") from None
    if version != "3.0":
        raise UsageError(
            f"--wordnet {folder}: WordNet {version or 'of an unknown version'}; the offsets in ImageNet's list are "
            "those of 3.0"
        )
    return reader
