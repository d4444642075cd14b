"""Files and objects that appear whole, and remote files that are read to their end.

An **atomic file** is written under a temporary name and appears under its own by one rename (``files``).  A **URL**
names an input that is not on a filesystem of this machine, and never shows its secrets (``urls``).  A **remote read**
goes on where it was cut off (``remote_read``), as often as a **retry policy** says (``retry``).  A **bucket** takes
outputs as multipart uploads that appear when they are completed (``buckets``).  YAML of users is read within bounds
(``yaml_files``).
"""
