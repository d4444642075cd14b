"""``select`` and ``neardup``: samples chosen by the tables and features of stage 06.

A **condition** is SQL on their columns; near duplicates are vectors whose cosine is above a threshold, and the
**clusters** that they form.
"""
