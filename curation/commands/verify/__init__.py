"""``verify`` proves that hybrid shards are their source with the edits applied.

A **proof** computes and compares every byte of a hybrid shard; **conservation** compares counts from stage to stage; an
**explanation** tells which samples of a shard differ from the expected ones, and how.
"""
