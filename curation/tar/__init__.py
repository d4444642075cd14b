"""Tar shards as WebDataset has them, read in one pass.

A **member** is one file in a tar; a **sample** is the run of members with one key, and its **span** is where they
lie; a **window** is the part of the shard that is in memory; a **scan** goes through a shard from its first header
to its last and reports **damage**; a **splice** is a copy of a shard in which some samples are replaced.
"""
