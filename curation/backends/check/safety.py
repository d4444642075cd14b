"""Is the picture safe for work?  By Open NSFW, or by DataComp's head on features of CLIP ViT-L/14, as in stage 06."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from curation import backends
from curation.backends.check import located
from curation.backends.check.features import (
    PreparedBatch,
    PreparedPicture,
    in_equal_batches,
    rows_at_once,
    shared,
)
from curation.check.api import Asked, Verdict
from curation.check.settings import CheckSettings
from curation.errors import InfrastructureError, UsageError, install_alone, require
from curation.extract.settings import ModelSettings
from curation.images import Pixels
from curation.models.needs import NothingToFetch, WeightsNeed

DEFAULT_MODEL: Final = CheckSettings().nsfw_model
OPEN_NSFW: Final = "open-nsfw"
CLIP_HEAD: Final = "nsfw-image-oai-clip-vit-l-14"
CLIP: Final = "oai-clip-vit-l14"  # whose features the head takes


class _Network(Protocol):
    """What gives the probability that a picture is not safe for work."""

    device: str

    def prepare(self, picture: Pixels) -> Any: ...

    def probabilities(self, prepared: Sequence[Any]) -> Sequence[float]: ...


class Backend:
    """One network."""

    name = "safety"

    def __init__(self, settings: CheckSettings) -> None:
        self.record = self.identify(settings)
        self._most = settings.max_nsfw
        self._network: _Network = (_OpenNsfw if _name(settings) == OPEN_NSFW else _ClipHead)(settings)
        self.device = self._network.device

    @classmethod
    def require(cls, settings: CheckSettings) -> None:
        if _name(settings) == OPEN_NSFW:
            require("onnxruntime")
        else:
            for model in _of_the_head():
                model.require()

    @classmethod
    def weights(cls, settings: CheckSettings) -> Sequence[WeightsNeed]:
        if _name(settings) == OPEN_NSFW:
            return [NothingToFetch(f"{_open_nsfw(settings).path}: Open NSFW came with its package, nothing to fetch")]
        return [need for model in _of_the_head() for need in located.weights_of(model, settings.cache)]

    @classmethod
    def identify(cls, settings: CheckSettings) -> Mapping[str, Any]:
        if _name(settings) == OPEN_NSFW:
            found = _open_nsfw(settings)
            return {"model": OPEN_NSFW, "revision": found.revision, "max_nsfw": settings.max_nsfw}
        head, clip = (located.locate(model, settings.cache) for model in _of_the_head())
        features = {"model": clip.public, "revision": clip.revision}
        return {"model": CLIP_HEAD, "revision": head.revision, "features": features, "max_nsfw": settings.max_nsfw}

    def prepare(self, picture: Pixels) -> Any:
        return self._network.prepare(picture)

    def judge(self, prepared: Sequence[Any], asked: Sequence[Asked]) -> list[Verdict]:
        """Scores: ``nsfw``, the probability that the picture is not safe for work."""
        found = [round(float(score), 4) for score in self._network.probabilities(prepared)] if prepared else []
        return [Verdict(score <= self._most, {"nsfw": score}) for score in found]

    def close(self) -> None:
        del self._network


class _OpenNsfw:
    """It looks at a picture on the CPU while it is prepared, in many threads at once: a GPU that generates pictures
    does not wait for it, and its scores are the same beside every GPU."""

    device = "cpu"

    def __init__(self, settings: CheckSettings) -> None:
        path = _open_nsfw(settings).path
        self._extractor = backends.load("extract", "open_nsfw")(OPEN_NSFW, ModelSettings(weights=str(path)))
        [self._crop] = self._extractor.preparations

    def prepare(self, picture: Pixels) -> float:
        [scores] = self._extractor.compute(PreparedBatch({self._crop: self._crop(picture)[None]})).values()
        return float(scores[0])

    def probabilities(self, prepared: Sequence[float]) -> Sequence[float]:
        return prepared


class _ClipHead:
    """The head, on features that are shared with the checks that name the same CLIP."""

    def __init__(self, settings: CheckSettings) -> None:
        head, clip = _of_the_head()
        self.device = settings.device
        self._clip = shared(clip, settings)
        path = located.locate(head, settings.cache).path
        self._head = backends.load("extract", "clip_head")(
            CLIP_HEAD, ModelSettings(weights=str(path), device=settings.device)
        )
        [self._needs] = self._head.needs

    def prepare(self, picture: Pixels) -> PreparedPicture:
        return self._clip.prepare(picture)

    def probabilities(self, prepared: Sequence[PreparedPicture]) -> Sequence[float]:
        return in_equal_batches(list(self._clip.pictures(prepared)), rows_at_once(self.device), self._compute)

    def _compute(self, features: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        [scores] = self._head.compute(PreparedBatch({}, features={self._needs: np.stack(features)})).values()
        return np.asarray(scores, np.float32)


def _name(settings: CheckSettings) -> str:
    for family in ("open_nsfw", "clip_head"):
        found = located.wanted("safety", "nsfw_model", settings.nsfw_model, DEFAULT_MODEL, family).directive
        if found in (OPEN_NSFW, CLIP_HEAD):
            return found
    raise UsageError(f"--nsfw_model {settings.nsfw_model}: no such model; there are {OPEN_NSFW} and {CLIP_HEAD}")


def _open_nsfw(settings: CheckSettings) -> located.Located:
    """The package's file."""
    model = located.wanted("safety", "nsfw_model", OPEN_NSFW, DEFAULT_MODEL, "open_nsfw")
    try:
        return located.locate(model, settings.cache)
    except InfrastructureError:
        package = backends.load("extract", "open_nsfw").package
        how = install_alone(package, beside="onnxruntime")
        raise InfrastructureError(f"--check safety: the model of Open NSFW is not on this machine: {how}") from None


def _of_the_head() -> tuple[located.Wanted, located.Wanted]:
    """The head, and the CLIP whose features it takes: one command fetches both."""
    head = located.wanted("safety", "nsfw_model", CLIP_HEAD, DEFAULT_MODEL, "clip_head")
    clip = located.Wanted("safety", "nsfw_model", CLIP, False, backends.load("extract", "clip"), named_by=CLIP_HEAD)
    return head, clip
