"""Commands that look at the folders of a dataset, whichever stages ran there: ``python -m curation <command>``."""
