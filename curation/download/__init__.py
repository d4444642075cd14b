"""Stage 00: URL tables become shards.

A **table** lists URLs and captions, and is cut into shards; a **row** is one URL and its caption; a **downloader** asks
many hosts at once, each within its limits; an **image policy** says what is stored of the bytes that came.
"""
