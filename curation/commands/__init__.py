"""The commands of ``curation``: what one does with the folders of a dataset beside running its stages.

A **place** is a folder in which a stage has run; a **finding** is something wrong with one, and says what to do.
"""
