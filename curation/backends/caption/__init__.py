"""Vision-language models that write captions: one file for each family, with its ``Backend``.

``base`` has what the families of transformers share, and ``decoding`` how they choose tokens.  A new family is a new
file; ``llava`` and ``smolvlm`` are short examples.
"""
