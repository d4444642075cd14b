"""``status``: how far every stage is.

A **scan** sums the receipts of a stage; **live claims** are shards that a process works on now.
"""
