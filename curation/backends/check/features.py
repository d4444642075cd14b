"""Features of pictures and texts by stage 06's CLIP and SigLIP models, computed once for all checks that want them.

Checks of one process that name the same model on the same device share it.  What it has computed of a picture stays at
the prepared picture: the first check that judges it computes, and the others read.

A batch always has the same number of rows, filled up where there are fewer, so that the same kernels compute every
picture and every text, whichever others are judged with it.  On the CPU that number is one, which costs nothing there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from curation import backends
from curation.backends.check.located import Wanted, locate
from curation.check.settings import CheckSettings
from curation.extract.api import Preparation
from curation.extract.settings import ModelSettings
from curation.images import Pixels
from curation.jsonio import clean_text

ROWS_ON_A_GPU = 16  # of a batch

_LOADED: weakref.WeakValueDictionary[tuple[object, ...], ClipFeatures] = weakref.WeakValueDictionary()
_LOADING = threading.Lock()
Row = TypeVar("Row")


@dataclass(slots=True)
class PreparedPicture:
    """A picture as the model takes it, and its features once they are computed."""

    inputs: Mapping[Preparation, NDArray[Any]]
    features: NDArray[np.float32] | None = field(default=None, repr=False)


class PreparedBatch:
    """Prepared inputs that are all there, as an extractor takes them.

    features: of other extractors, by name.
    """

    def __init__(
        self,
        arrays: Mapping[Preparation, NDArray[Any]],
        device: str = "cpu",
        features: Mapping[str, Any] | None = None,
    ) -> None:
        self._arrays = arrays
        self._device = device
        self.features: Mapping[str, Any] = features or {}

    def __len__(self) -> int:
        return len(next(iter((self._arrays or self.features).values())))

    @property
    def readable(self) -> NDArray[np.bool_]:
        return np.ones(len(self), np.bool_)

    def prepared(self, preparation: Preparation) -> Any:
        return self._arrays[preparation]

    def device_tensor(self, preparation: Preparation) -> Any:
        import torch

        return torch.from_numpy(self._arrays[preparation]).to(self._device)

    def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class ClipFeatures:
    """One model on one device.

    Attributes:
        scale: What cosines are multiplied by before a softmax.
    """

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        """Load the model.

        Args:
            directive: As in stage 06's ``models``.
            settings: As an extractor takes them.
        """
        self._backend = backends.load("extract", "clip")(directive, settings)
        self.revision: str = self._backend.revision
        self.scale: float = self._backend.scale
        self._device = settings.device
        self._rows = rows_at_once(settings.device)
        self._of_pictures = [p for p in self._backend.preparations if p.takes == "image"]
        [self._of_texts] = [p for p in self._backend.preparations if p.takes == "text"]
        self._computing = threading.Lock()
        self._seen: dict[int, tuple[weakref.ref[Pixels], PreparedPicture]] = {}

    def prepare(self, picture: Pixels) -> PreparedPicture:
        """Make of a picture what ``pictures`` takes; for checks that prepare the same array it is the same object."""
        key = id(picture)
        known = self._seen.get(key)
        if known is not None and known[0]() is picture:
            return known[1]
        made = PreparedPicture({preparation: preparation(picture) for preparation in self._of_pictures})
        seen = self._seen
        self._seen[key] = (weakref.ref(picture, lambda _: seen.pop(key, None)), made)
        return made

    def pictures(self, prepared: Sequence[PreparedPicture]) -> NDArray[np.float32]:
        """Features of pictures × width, each of length one."""
        with self._computing:
            new = list({id(one): one for one in prepared if one.features is None}.values())

            def compute(rows: Sequence[PreparedPicture]) -> NDArray[np.float32]:
                arrays = {p: np.stack([one.inputs[p] for one in rows]) for p in self._of_pictures}
                return self._numbers(self._backend.picture_features(PreparedBatch(arrays, self._device)))

            for one, features in zip(new, in_equal_batches(new, self._rows, compute), strict=True):
                one.features = features
        return np.stack([one.features for one in prepared if one.features is not None])

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Features of texts × width, each of length one, of the clean line that stage 06 reads.

        What a text has more than the model reads, 77 tokens with CLIP, is cut off, as in stage 06.
        """

        def compute(rows: Sequence[str]) -> NDArray[np.float32]:
            tokens = {self._of_texts: np.stack([self._of_texts(clean_text(text)) for text in rows])}
            return self._numbers(self._backend.text_features(PreparedBatch(tokens, self._device)))

        with self._computing:
            return np.stack(in_equal_batches(texts, self._rows, compute))

    @staticmethod
    def _numbers(features: Any) -> NDArray[np.float32]:
        return np.asarray(features.cpu().numpy(), np.float32)


def shared(model: Wanted, settings: CheckSettings) -> ClipFeatures:
    """A check's model, loaded once for all that ask for it in this process as long as one of them has it.

    Raises:
        InfrastructureError: It is not on this machine, or it cannot be loaded.
    """
    there = locate(model, settings.cache)
    key = (there.directive, str(there.path), there.revision, settings.device)
    with _LOADING:
        found = _LOADED.get(key)
        if found is None:
            own = ModelSettings(weights=str(there.path), device=settings.device, threads=settings.threads)
            found = _LOADED[key] = ClipFeatures(there.directive, own)
    return found


def cosine(features: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of each row with the same row of the others, or with the only one."""
    return np.asarray((features * others).sum(1), np.float32)


def rows_at_once(device: str) -> int:
    """How many rows every batch has on a device."""
    return 1 if device == "cpu" else ROWS_ON_A_GPU


def in_equal_batches(items: Sequence[Row], rows: int, compute: Callable[[Sequence[Row]], Any]) -> list[Any]:
    """What ``compute`` gives for each item, always called with ``rows`` of them: the last ones fill the batch up."""
    found: list[Any] = []
    for start in range(0, len(items), rows):
        part = list(items[start : start + rows])
        found += list(compute(part + part[-1:] * (rows - len(part))))[: len(part)]
    return found
