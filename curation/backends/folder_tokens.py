"""Tokens of a caption by the tokenizer that lies in a model's folder, padded to one length."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from curation.errors import InfrastructureError
from curation.models.hub_cache import quiet_transformers

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
