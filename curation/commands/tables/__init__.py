"""``select`` and ``neardup``: samples chosen by the tables and features that stage 06 wrote.

A **ShardTable** is a shard's parquet with its features; an **SqlFilter** is a condition on the columns.  A **group** of
near duplicates are samples that are connected by pairs of similar features.
"""
