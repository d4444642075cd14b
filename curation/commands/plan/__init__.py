"""``plan``: what the rest of the shards will cost, from the receipts of those that are done.

A **StageCost** holds what the measured shards of a stage cost, and an **Estimate** for the others.  A **Quota** is what
may still be written to a filesystem.  A **JobShape** is what a stage's ``.sh`` asks SLURM for.
"""
