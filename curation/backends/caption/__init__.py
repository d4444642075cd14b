"""Vision-language models that write captions: a file a family, each with a ``Backend``.

``base`` has what families share, ``decoding`` the loop that chooses tokens.
"""
