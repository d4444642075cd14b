"""``report``: one HTML page about a dataset.

**Facts** are all that the page shows, as one value: sums over receipts, and the samples of some shards; charts are SVG.
"""
