"""Reads and writes tar shards in WebDataset's format, in one pass.

A **member** is one file in a tar.  A **sample** is a run of members with one key, and its **span** is their place in
the file.  A **window** is the part of the shard that is in memory.  A **scan** reads a shard from its first header to
its end and reports **damage**.  A **splice** is a copy of a shard in which samples are kept, dropped, replaced by their
edit or copied under other keys, as was **decided**.  A **proof** computes every byte of a splice again and compares.
"""

from curation.tar.samples import Sample, TarWriter, open_sample, read_samples
from curation.tar.scan import SampleSpan, TarReport, TarScan, Window

__all__ = ["Sample", "SampleSpan", "TarReport", "TarScan", "TarWriter", "Window", "open_sample", "read_samples"]
