"""Makes a query of a text or a picture, with the model that computed the feature of the index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation import PROGRAM
from curation.backends.extract import families
from curation.commands.search.source import FeatureModel
from curation.commands.search.stored import IndexRecord
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.extract.api import Extractor, Feature, Preparation, SampleFacts
from curation.extract.catalogue import Catalogue
from curation.extract.config import read_config
from curation.images import MAX_PIXELS, Pixels, decode_rgb
from curation.jsonio import clean_text
from curation.storage.files import read_given

MAX_TEXT = 10_000  # characters; CLIP's models read 77 tokens at most
MAX_IMAGE_BYTES = 256 << 20


class QueryModel:
    """The model of an index, on the CPU and in float32."""

    def __init__(self, record: IndexRecord, model: str | None, weights: str | None, threads: int) -> None:
        """Loads the model.

        Args:
            record: Of the index.
            model: The model that the user names; None: that of the index.
            weights: Other weights for it, as stage 06's ``--weights`` takes them.
            threads: Of the CPU.

        Raises:
            UsageError: It is not the model that computed the index, or nobody knows which one did.
            InfrastructureError: It cannot be loaded.
        """
        recorded = record.model
        if recorded is None:
            raise UsageError(
                f"the index does not tell which model computed {clean_text(record.feature)!r} (a plugin, or another "
                "program); search it with --like"
            )
        given = {"models": recorded.directive, "input_tars": "-", "output_metadata_dir": "-", "device": "cpu"}
        if weights is not None:
            given["weights"] = f"{recorded.directive}={weights}"
        catalogue = Catalogue(families(), read_config(None, given, folders=False))
        if model is not None and model != recorded.directive:
            raise UsageError(
                f"--model {clean_text(model)}: the index was made with {clean_text(recorded.directive)}, and the "
                "vectors of two models cannot be compared; leave --model out, or make an index of the other's feature"
            )
        try:
            self._extractor = catalogue.make(recorded.directive, "cpu", threads)
        except InfrastructureError as error:
            fetch = f"{PROGRAM} models fetch 06_metadata --models {clean_text(recorded.directive)}"
            raise InfrastructureError(f"{error}; `{fetch}` downloads it where there is internet") from error
        _check_revision(recorded, self._extractor)
        self._width, self._directive = record.width, recorded.directive

    def of_text(self, text: str) -> NDArray[np.float64]:
        """Returns the vector of a text.  Raises UsageError where the model reads no texts, or this one is too long."""
        if not text.strip() or len(text) > MAX_TEXT:
            raise UsageError(f"--text: give 1 to {MAX_TEXT:,} characters")
        grey = np.full((64, 64, 3), 128, np.uint8)  # the model looks at a picture too, whose vector is not used
        return self._vector("--text", "text", grey, text, lambda feature: feature.needs_image is False)

    def reads_to_the_end(self, text: str) -> bool:
        """Whether the last character of a text is part of what the model is given: CLIP's models cut texts off."""
        text = text.strip()
        return any(
            not np.array_equal(np.asarray(preparation(text)), np.asarray(preparation(text[:-1])))
            for preparation in self._extractor.preparations
            if preparation.takes == "text"
        )

    def of_image(self, path: Path) -> NDArray[np.float64]:
        """Returns the vector of a picture.  Raises UsageError where it cannot be read, or the model sees none."""
        data = read_given(f"--image {path}", path, MAX_IMAGE_BYTES)
        try:
            pixels = decode_rgb(data, MAX_PIXELS, on_white=False)
        except SampleError as error:
            raise UsageError(f"--image {path}: {error}") from None
        return self._vector("--image", "image", pixels, "", lambda feature: feature.needs_image is not False)

    def _vector(
        self, flag: str, kind: str, pixels: Pixels, text: str, fits: Callable[[Feature], bool]
    ) -> NDArray[np.float64]:
        takes = {preparation.takes for preparation in self._extractor.preparations}
        feature = next(filter(fits, self._extractor.features), None)
        if feature is None or kind not in takes:
            raise UsageError(f"{flag}: {self._directive} computes no vector of a{'n' * (kind == 'image')} {kind}")
        if feature.width != self._width:
            raise UsageError(
                f"{flag}: {self._directive} gives {feature.width:,} numbers, and the index has {self._width:,}"
            )
        found = self._extractor.compute(_OneSample(pixels, text))[feature.name]
        if callable(getattr(found, "detach", None)):
            found = found.detach().float().cpu().numpy()
        vector: NDArray[np.float64] = np.asarray(found, np.float64)[0]
        if not np.isfinite(vector).all() or not vector.any():
            raise UsageError(f"{flag}: {self._directive} gives no finite vector for it")
        return vector

    def close(self) -> None:
        self._extractor.close()


def _check_revision(recorded: FeatureModel, extractor: Extractor) -> None:
    """Raise UsageError for other weights than those of the index; where it does not know them, any are taken."""
    if recorded.revision and str(extractor.revision) != recorded.revision:
        raise UsageError(
            f"the weights of {clean_text(recorded.directive)} are of revision {clean_text(extractor.revision)}, and "
            f"the index was made with revision {clean_text(recorded.revision)}; name those with --weights"
        )


class _OneSample:
    """A batch of one sample that is prepared in this process."""

    features: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, pixels: Pixels, text: str) -> None:
        self._given = {"image": pixels, "text": text}
        self._given["sample"] = SampleFacts("", {}, text or None, b"", (pixels.shape[1], pixels.shape[0]))
        self.readable = np.ones(1, np.bool_)

    def __len__(self) -> int:
        return 1

    def prepared(self, preparation: Preparation) -> Any:
        found = preparation(self._given[preparation.takes])
        return [found] if isinstance(found, dict) else found[None]

    def device_tensor(self, preparation: Preparation) -> Any:
        import torch

        return torch.from_numpy(np.array(self.prepared(preparation)))

    def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
