"""Stage 05: images get new captions.

A **captioner** is a vision-language model of a **family**; a **loader** decodes and prepares images ahead of it and
gathers them into **batches** of one shape; a **row** is one caption with its key, from which each format is written.
"""
