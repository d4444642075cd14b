"""``python -m curation report``: everything about the folders of a dataset, on one page without a server."""
