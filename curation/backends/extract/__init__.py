"""Models that score and describe samples: a file a family, found by the scan in ``curation.backends``.

A file's ``Backend`` is an ``ExtractorFamily``: it names its directives with their columns and features, says where its
weights come from, and makes an extractor of a directive.  ``layers``, ``pictures`` and ``tokens`` have what families
share: tensors by name, preprocessing, tokenizers.
"""

from __future__ import annotations

from curation import backends
from curation.extract.api import ExtractorFamily


def families() -> list[ExtractorFamily]:
    """Every family of extractors that has a file in this folder."""
    return [backends.load("extract", name) for name in backends.names("extract")]
