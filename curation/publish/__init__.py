"""Finished outputs in a store: a bucket, another filesystem, or a dataset repository of the Hugging Face Hub.

A **store** holds files under names that look like paths; a **part** is one file of a finished shard; the **card** is
the README of a repository on the hub, of which only the blocks between the marks are written.  Publishing begins
after the commit: what the receipts name and the store lacks is uploaded, by anyone and any number of times.
"""
