"""``plan``: what a run over all shards will cost, forecast from a few.

A **cost** is measured from receipts, with its error; the **site** is what the filesystem, the quotas and SLURM allow.
"""
