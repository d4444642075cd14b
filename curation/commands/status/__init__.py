"""``status``: how far each stage below a folder is, from receipts, plans and claims alone.

A **ScannedStage** is a stage whose receipts are read; **StageCounts** are what they add up to.  A **LiveClaim** is a
worker's claim on a shard, with what its heartbeat says.
"""
