"""Stage 03: prompts become images.

A **batch plan** says which samples are generated together and at which size, and depends on the shard alone; the
**encoded log** keeps the images that are finished while the device makes the next ones.
"""
