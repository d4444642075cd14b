"""Curation of web-scale image-text datasets, shard by shard.  See docs/design.md."""

__version__ = "0.3.0"
