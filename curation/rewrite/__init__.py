"""Stage 02: captions become prompts.

A **group** is what a rewritten caption portrays (gender and ethnicity), assigned or recognised; a **prompt** is the
text that an image is generated for; a **question** is what a language model is asked, and a reply is judged before
it counts.
"""
