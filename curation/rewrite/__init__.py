"""Stage 02: captions become prompts.

A **group** is what a rewritten caption portrays (gender and ethnicity), assigned or recognised; a **prompt** is the
text for which an image is generated; a **question** is a request to a language model, and its reply is checked before
it counts.
"""
