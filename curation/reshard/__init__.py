"""Stage 04: source shards and edits become hybrid shards.

A **choice** says what becomes of a sample: kept, replaced by its **edit**, or dropped; a **layout** spreads samples
over shards of another size; a **uid subset** is DataComp's list of samples.
"""
