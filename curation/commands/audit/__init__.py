"""``audit`` compares the attrition of the groups that stage 02 assigned.

**GroupCounts** count the samples of one group that reached each step; a **Difference** compares the share of one group
with that of all others, with a confidence interval.  A prompt **mentions** a value of an attribute if it has a word for
it.  The **data card** and the Croissant file describe the dataset for others.
"""
