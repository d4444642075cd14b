"""Stage 05: images get new captions.

A **captioner** is a vision-language model of a **family**, which is one file in ``backends/caption/``.  A **loader**
decodes and prepares the images of a shard ahead of it and gathers them into **batches** of one shape.  A **row** is one
caption with its key and everything that is known of its image; each output format is written from the rows.
"""

from curation.caption.batching import ShardCaptioner
from curation.caption.captioner import (
    Attention,
    CaptionSettings,
    Compile,
    Detail,
    Family,
    Gather,
    OutOfMemory,
    Quantize,
    known_models,
    named,
    resolve,
)
from curation.caption.feed import CaptionLoader, CaptionSample
from curation.caption.preview import first_images, show_trial, write_comparison
from curation.caption.rows import (
    Format,
    finish_parquet,
    import_arrow,
    jsonl_lines,
    parse_formats,
    reusable_captions,
    rows_name,
    write_format,
    write_rows,
)

__all__ = [
    "Attention",
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
    "ShardCaptioner",
    "finish_parquet",
    "first_images",
    "import_arrow",
    "jsonl_lines",
    "known_models",
    "named",
    "parse_formats",
    "resolve",
    "reusable_captions",
    "rows_name",
    "show_trial",
    "write_comparison",
    "write_format",
    "write_rows",
]
