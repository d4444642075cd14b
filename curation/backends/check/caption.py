"""Does a caption say what its picture shows?  The check ``prompt`` with the options of stage 05."""

from __future__ import annotations

from curation.backends.check import prompt


class Backend(prompt.Backend):
    """The same model and the same score, with the caption as the text."""

    name = "caption"
    stage, model_flag, least_flag = "05", "check_model", "min_caption_score"
