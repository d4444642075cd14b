"""``audit``: what became of the samples of each group that stage 02 assigned.

**GroupCounts** say how many samples of one group came to each step; a **Difference** is the share of one group beside
that of all others, with its confidence interval.  A prompt **mentions** a value of an attribute where it has a word for
it.  The **data card** and the Croissant file describe the dataset for others.
"""
