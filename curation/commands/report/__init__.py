"""``report``: one HTML page about a dataset.

**ReportFacts** are all that the page shows, as one value: **ReceiptStats** are sums over the receipts of a stage, and
**SampleStats** come from the samples of some shards.  A **GallerySample** is a sample that is shown.  A **GridCell**
stands for one shard, or for neighbours where there are too many.  A **Chart** is a histogram with its numbers.
"""
