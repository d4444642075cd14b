"""Captions that were made already, by stage 05 or by another tool, and how the caption of a sample is found among them.

A **row** is the caption, or the captions by name, of one sample; it says of which sample by uid, by tar and key, by key
or by URL.  Stage 05 takes rows of other tools as done work, and stage 04 mixes captions into the hybrid shards.
"""
