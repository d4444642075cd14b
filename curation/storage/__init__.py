"""Files and objects, and how they come to be there whole.

An **atomic file** is written under a temporary name and appears under its own by one rename; a **URL** names an input
that is not on a filesystem of this machine; a **remote read** goes on where it was cut off; a **bucket** takes outputs
as multipart uploads that appear when they are completed.
"""
