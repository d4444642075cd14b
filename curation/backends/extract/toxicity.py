"""``nsfw-detoxify``: how toxic a caption is, the largest of detoxify's seven probabilities.

detoxify's "multilingual" model is an XLM-RoBERTa classifier of sixteen outputs; its package looks at the first seven,
the kinds of toxicity, and never at the other nine, which say whom a text is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curation.backends.extract.tokens import FolderTokens
from curation.errors import InfrastructureError
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource
from curation.models.hub_cache import folder_digest, quiet_transformers
from curation.models.weights import fetch_weights

SOURCE = WeightSource("unitary/multilingual-toxic-xlm-roberta")


MAX_TOKENS = 512


# detoxify's names; the older models' differ.
TOXICITY = ("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


_OTHER_NAMES = {"toxic": "toxicity", "identity_hate": "identity_attack", "severe_toxic": "severe_toxicity"}


class Backend(Extractor):
    """The classifier of one folder."""

    directives = (Directive("nsfw-detoxify", ("{}-score",), (), SOURCE.source, "Apache-2.0", 0.278),)

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
        mask = tokens != self._tokens.padding
        longest = max(1, int(mask.sum(1).max()))  # detoxify pads to the longest of a batch, too
        with torch.inference_mode():
            logits = self._model(input_ids=tokens[:, :longest].long(), attention_mask=mask[:, :longest].long()).logits[
                :, self._outputs
            ]
            scores = torch.sigmoid(logits.float()).amax(1)
        return {self.columns[0].name: scores.cpu().numpy()}

    def close(self) -> None:
        self._model = None


def toxicity_outputs(labels: Mapping[int, str]) -> list[int]:
    """The outputs that are kinds of toxicity: by their names, or the first seven where they have none."""
    names = [_OTHER_NAMES.get(labels[i], labels[i]) for i in sorted(labels)]
    return [i for i, name in enumerate(names) if name in TOXICITY] or list(range(min(len(names), len(TOXICITY))))
