"""Stage 04: source shards and edits become hybrid shards.

A **choice** says whether a sample is kept, replaced by its **edit**, or dropped; a **layout** distributes samples
over shards of another size; a **uid subset** is DataComp's list of samples.
"""
