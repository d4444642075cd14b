"""Stage 03: prompts become images.

A **batch plan** determines which samples are generated together and at which size; it depends only on the shard.  The
**encoded log** saves finished images while the device makes the next ones.
"""
