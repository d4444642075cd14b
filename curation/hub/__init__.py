"""Finished outputs on the Hugging Face Hub.

A **part** is one file of a finished shard; a **push** uploads the parts that the repository lacks; the **card** is the
repository's README, of which only the blocks between the project's marks are written.
"""
