"""Models that score and describe samples: a file a family, each with a ``Backend``.

``layers``, ``pictures`` and ``tokens`` have what families share: tensors by name, preprocessing, tokenizers.
"""
