"""``select`` and ``neardup`` choose samples by the tables and features that stage 06 wrote.

A **ShardTable** is a shard's parquet with its features; an **SqlFilter** finds rows by a condition on the columns.  A
**group** of near duplicates consists of samples that are connected by pairs of similar features.
"""
