"""``curation run``: a **pipeline** is a YAML file with the stages of a whole run and their options.

An **entry** is one stage in it, with its options as the file writes them.  A **variable** is a name that the options
may use as ``${NAME}``.  A **setting** is a value that the command line gives instead of the file.
"""
