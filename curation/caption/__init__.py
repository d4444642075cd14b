"""Stage 05: images get new captions.

A **captioner** is a vision-language model of a **family**, which is one file in ``backends/caption/``.  A **loader**
decodes and prepares the images of a shard ahead of it and gathers them into **batches** of one shape.  A **row** is one
image with its captions and everything that is known of it; each output format is written from the rows.  A **question**
is what is asked about each image, once for each of its captions, and a **template** is a prompt with fields, which a
sample's own values fill.
"""

from curation.caption.batching import ShardCaptioner, check_each_caption
from curation.caption.captioner import (
    Attention,
    CaptionSettings,
    Compile,
    Detail,
    Family,
    Gather,
    OutOfMemory,
    Quantize,
    Question,
    known_models,
    named,
    resolve,
)
from curation.caption.checks import CaptionChecks
from curation.caption.earlier import reusable_captions
from curation.caption.feed import CaptionLoader, CaptionSample
from curation.caption.preview import first_images, show_trial, write_comparison
from curation.caption.prompts import check_fields, read_questions
from curation.caption.rows import (
    Format,
    finish_parquet,
    import_arrow,
    jsonl_lines,
    parse_formats,
    rows_name,
    write_format,
    write_rows,
)
from curation.caption.schema import AnswerSchema
from curation.captioned.adopted import AdoptedCaptions

__all__ = [
    "AdoptedCaptions",
    "AnswerSchema",
    "Attention",
    "CaptionChecks",
    "CaptionLoader",
    "CaptionSample",
    "CaptionSettings",
    "Compile",
    "Detail",
    "Family",
    "Format",
    "Gather",
    "OutOfMemory",
    "Quantize",
    "Question",
    "ShardCaptioner",
    "check_each_caption",
    "check_fields",
    "finish_parquet",
    "first_images",
    "import_arrow",
    "jsonl_lines",
    "known_models",
    "named",
    "parse_formats",
    "read_questions",
    "resolve",
    "reusable_captions",
    "rows_name",
    "show_trial",
    "write_comparison",
    "write_format",
    "write_rows",
]
