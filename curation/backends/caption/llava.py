"""Captions by LLaVA 1.6 and LLaVA-OneVision: an image is a thumbnail and as many tiles as its form asks for."""

from __future__ import annotations

from curation.backends.caption.base import ChatCaptioner


class Backend(ChatCaptioner):
    """A batch holds images of one number of tiles and nearly one number of tokens."""

    family = "llava"
