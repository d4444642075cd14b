"""``verify``: the proof that hybrid shards are their source with the edits in place.

A **proof** foretells every byte of a hybrid shard; **conservation** compares counts from stage to stage; an
**explanation** says which samples of a shard are not what they should be, and how.
"""
