"""``audit``: what became of each group's samples.

A **tally** counts a group's samples from stage to stage; a **difference** is one that is beyond chance; the **data
card** and the Croissant file describe the dataset for others.
"""
