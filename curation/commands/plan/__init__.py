"""``plan`` estimates the cost of the remaining shards from the receipts of finished ones.

A **StageCost** holds what the measured shards of a stage cost, and an **Estimate** for the others.  A **Quota** is what
may still be written to a filesystem.  A **JobShape** is the request of a stage's ``.sh`` to SLURM.
"""
