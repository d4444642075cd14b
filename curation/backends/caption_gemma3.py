"""Captions by Gemma 3: every image a square of one size, 256 tokens."""

from __future__ import annotations

from curation.backends.chat_captions import ChatCaptioner


class Backend(ChatCaptioner):
    """All batches have one shape."""

    family = "gemma3"
    half_overflows = True
