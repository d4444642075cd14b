"""CLIP's tokens of a caption, as OpenAI's tokenizer makes them: 77 integers, cut off where the caption is longer.

OpenAI's: ftfy, HTML unescaped twice, whitespace made single spaces, lower case, split by one pattern, byte-pair
encoding of each piece.  The tokenizer that the hub's library builds from the same files does without the first two and
lowers each letter by itself, so it differs on captions from the web.

Tokens of a caption by the tokenizer that lies in a model's folder, padded to one length.
"""

from __future__ import annotations

import functools
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.errors import InfrastructureError
from curation.libraries import np
from curation.models.hub_cache import quiet_transformers

if TYPE_CHECKING:
    from numpy.typing import NDArray


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


CONTEXT_LENGTH = 77


# A caption that is longer fills the 77 places long before: what is behind these characters changes nothing but time.
MAX_CHARACTERS = 10_000


START, END = "<|startoftext|>", "<|endoftext|>"


# What stands for the two marks in a caption itself: to OpenCLIP's tokenizer, which has the same vocabulary, it is this.
OPENCLIP_MARKS = "<start_of_text>", "<end_of_text>"


_PIECES = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True)
class ClipTokens:
    """A caption → ``length`` int32, zeros behind its end.

    folder: has vocab.json and merges.txt, or tokenizer.json.  marks: what in a caption counts as start and end.
    """

    takes: ClassVar[Literal["text"]] = "text"
    folder: str
    length: int = CONTEXT_LENGTH
    marks: tuple[str, str] = (START, END)

    def __call__(self, caption: str) -> NDArray[np.int32]:
        tokens = np.zeros(self.length, np.int32)
        found = encoder(self.folder, self.marks).encode(caption, self.length)
        tokens[: len(found)] = found
        return tokens


class Encoder:
    """The byte-pair encoding of one vocabulary."""

    def __init__(
        self, vocabulary: dict[str, int], merges: list[tuple[str, str]], marks: tuple[str, str] = (START, END)
    ) -> None:
        import regex  # type: ignore[import-untyped]
        from tokenizers.models import BPE

        self._start, self._end = vocabulary[START], vocabulary[END]
        self._special = dict(zip(marks, ((self._start,), (self._end,)), strict=True))
        self._bpe: Any = BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END)
        self._find: Any = regex.compile("|".join(map(regex.escape, marks)) + _PIECES, regex.IGNORECASE).findall
        self._letters = _letter_of_byte()

    def encode(self, caption: str, length: int) -> list[int]:
        """Start, the caption's tokens, end: at most ``length``, the end always there."""
        tokens = [self._start]
        for piece in self._find(clean(caption)):
            tokens += self._special.get(piece) or self._pieces(piece)
            if len(tokens) >= length:
                break
        return [*tokens[: length - 1], self._end]

    def _pieces(self, piece: str) -> list[int]:
        written = "".join(map(self._letters.__getitem__, piece.encode("utf-8", "replace")))
        return [token.id for token in self._bpe.tokenize(written)]


@functools.lru_cache(maxsize=4)
def encoder(folder: str, marks: tuple[str, str] = (START, END)) -> Encoder:
    """The encoder of a model's folder, read once in a process; InfrastructureError where it is not CLIP's."""
    path = Path(folder)
    try:
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            vocabulary = json.loads((path / "vocab.json").read_bytes())
            lines = (path / "merges.txt").read_text("utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        else:
            model = json.loads((path / "tokenizer.json").read_bytes())
            added = {token["content"]: token["id"] for token in model["added_tokens"]}
            vocabulary = model["model"]["vocab"] | added
            pairs = [m.split() if isinstance(m, str) else m for m in model["model"]["merges"]]
        return Encoder(vocabulary, [(left, right) for left, right in pairs], marks)
    except MemoryError:
        raise
    except Exception as error:  # a broken file, and tokenizers raises nothing narrower
        raise InfrastructureError(f"{folder}: CLIP's tokenizer cannot be read there ({error!r:.200})") from error


def _letter_of_byte() -> dict[int, str]:
    """Byte-level BPE's letter of each byte: printable ones stand for themselves."""
    letters = byte_letters()
    own = {ord(letter) for letter in letters if ord(letter) < 256}
    others = iter(letter for letter in letters if ord(letter) >= 256)
    return {byte: chr(byte) if byte in own else next(others) for byte in range(256)}


def is_clip_vocabulary(folder: Path) -> bool:
    """Whether the folder's tokenizer is CLIP's byte-pair encoding, and not another family's."""
    try:
        encoder(str(folder))
    except InfrastructureError:
        return False
    return True


def clean(caption: str) -> str:
    """The caption as the byte-pair encoding sees it."""
    import ftfy

    text = ftfy.fix_text(caption[:MAX_CHARACTERS])
    text = html.unescape(html.unescape(text)).strip()
    return " ".join(text.split()).lower()


MAX_CHARACTERS_PER_TOKEN = 64  # of a caption that are looked at: a hostile one has megabytes


@dataclass(frozen=True, slots=True)
class FolderTokens:
    """A caption → ``length`` int32, ``padding`` behind its end.  masked: whether the model is told where that is.

    serialized: the tokenizer as the library ``tokenizers`` writes it, so that worker processes need neither torch nor
    transformers; empty for one that is not of that library, which they load from the folder.
    """

    takes: ClassVar[Literal["text"]] = "text"
    folder: str
    length: int
    padding: int
    masked: bool
    serialized: str = field(default="", repr=False)

    @classmethod
    def of(cls, folder: Path, length: int, *, masked: bool) -> FolderTokens:
        """For the tokenizer of ``folder``, which is loaded here; ``length`` at most what it allows."""
        own = tokenizer(str(folder))
        if own.pad_token_id is None:
            raise InfrastructureError(f"{folder}: its tokenizer names no padding token")
        serialized = own.backend_tokenizer.to_str() if own.is_fast else ""
        length = min(length, int(own.model_max_length))
        return cls(str(folder), length, int(own.pad_token_id), masked, serialized)

    def __call__(self, caption: str) -> NDArray[np.int32]:
        text = caption[: self.length * MAX_CHARACTERS_PER_TOKEN].encode("utf-8", "replace").decode("utf-8")
        if self.serialized:
            found = _deserialized(self.serialized, self.length).encode(text).ids
        else:
            found = tokenizer(self.folder)(text, truncation=True, max_length=self.length)["input_ids"]
        tokens = np.full(self.length, self.padding, np.int32)
        tokens[: len(found)] = found
        return tokens


@functools.lru_cache(maxsize=4)
def _deserialized(serialized: str, length: int) -> Any:
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(serialized)
    found.no_padding()
    found.enable_truncation(length)
    return found


@functools.lru_cache(maxsize=4)
def tokenizer(folder: str) -> Any:
    """The folder's tokenizer, loaded once in a process; InfrastructureError where there is none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = str(error).strip().partition("\n")[0][:300]
        raise InfrastructureError(f"{folder}: its tokenizer cannot be loaded: {line}") from error
