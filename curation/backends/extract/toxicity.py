"""``nsfw-detoxify``: how toxic a caption is, the largest of detoxify's seven probabilities.

detoxify's "multilingual" model is an XLM-RoBERTa classifier of sixteen outputs; its package looks at the first seven,
the kinds of toxicity, and never at the other nine, which say whom a text is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from curation.backends.extract.tokens import FolderTokens
from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource
from curation.libraries import np
from curation.models.hub_cache import folder_digest, quiet_transformers
from curation.models.weights import fetch_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCE = WeightSource("unitary/multilingual-toxic-xlm-roberta")


MAX_TOKENS = 512
BUCKET_STEP = 4  # tokens of padding that are cheaper than one more call of the model


# detoxify's names; the older models' differ.
TOXICITY = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


_OTHER_NAMES = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}


class Backend(Extractor):
    """The classifier of one folder."""

    directives = (
        Directive(
            "nsfw-detoxify",
            ("{}-score",),
            (),
            SOURCE.source,
            "Apache-2.0",
            0.278,
            packages=("torch", "transformers", "tokenizers"),
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        quiet_transformers()
        self._torch = torch
        [source] = self.sources(directive, settings)
        folder = fetch_weights(source.source, source.sha256, settings.cache, name=directive)
        self.name, self.revision = directive, folder_digest(folder)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=settings.torch_dtype())
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            line = str(error).strip().partition("\n")[0][:300]
            raise InfrastructureError(f"{directive}: {folder} cannot be loaded: {line}") from error
        self._model: Any = model.to(settings.device).eval()
        self._outputs = toxicity_outputs(model.config.id2label)
        self._tokens = FolderTokens.of(folder, MAX_TOKENS, masked=True)
        self.preparations: tuple[Preparation, ...] = (self._tokens,)
        self.columns = (Column(f"{directive}-score", "float32"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        return [settings.source(SOURCE) or SOURCE]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """0 to 1; an empty caption has a score as any other."""
        torch = self._torch
        tokens = batch.device_tensor(self._tokens)
        scores = np.zeros(len(batch), np.float32)
        with torch.inference_mode():
            found = []
            buckets = length_buckets(lengths_of(batch.prepared(self._tokens), self._tokens.padding))
            for rows, longest in buckets:
                own = tokens[torch.from_numpy(rows).to(tokens.device), :longest].long()
                logits = self._model(input_ids=own, attention_mask=(own != self._tokens.padding).long()).logits
                found.append(torch.sigmoid(logits[:, self._outputs].float()).amax(1))
            for (rows, _), part in zip(buckets, found, strict=True):  # the device has worked on all of them meanwhile
                scores[rows] = part.cpu().numpy()
        return {self.columns[0].name: scores}

    def close(self) -> None:
        self._model = None


def lengths_of(tokens: NDArray[np.int32], padding: int) -> NDArray[np.intp]:
    """How many tokens each row has up to its last one that is not padding; at least 1."""
    places = np.arange(1, tokens.shape[1] + 1)
    lengths: NDArray[np.intp] = np.where(tokens == padding, 0, places).max(axis=1, initial=1)
    return lengths


def length_buckets(lengths: NDArray[np.intp]) -> list[tuple[NDArray[np.intp], int]]:
    """Rows that are computed together, and what they are padded to: the longest of them.

    The rows are taken from the shortest to the longest, and a new bucket begins where the first one of the bucket would
    be padded by more than a quarter and ``BUCKET_STEP`` tokens.  So captions of the web, most of which have about
    twenty tokens, are not padded to the longest of several hundred.
    """
    order = np.argsort(lengths, kind="stable")
    buckets: list[tuple[NDArray[np.intp], int]] = []
    start = 0
    while start < len(order):
        most = lengths[order[start]] * 5 // 4 + BUCKET_STEP
        end = int(np.searchsorted(lengths[order], most, side="right"))
        buckets.append((order[start:end], int(lengths[order[end - 1]])))
        start = end
    return buckets


def toxicity_outputs(labels: Mapping[int, str]) -> list[int]:
    """The outputs that are kinds of toxicity: by their names, or the first seven where they have none."""
    names = [_OTHER_NAMES.get(labels[i], labels[i]) for i in sorted(labels)]
    return [i for i, name in enumerate(names) if name in TOXICITY] or list(range(min(len(names), len(TOXICITY))))
