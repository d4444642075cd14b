"""Watermark detectors: a file each, with a ``Backend`` that gives each image a probability."""
