"""Tar shards as WebDataset has them, read in one pass.

A **member** is one file in a tar.  A **sample** is the run of members with one key, and its **span** is where they lie.
A **window** is the part of the shard that is in memory.  A **scan** goes through a shard from its first header to its
last and reports **damage**.  A **splice** is a copy of a shard in which samples are kept, dropped, replaced by their
edit or copied under other keys, as was **decided**.  A **proof** foretells every byte of a splice, and compares.
"""

from curation.tar.samples import Sample, TarWriter, open_sample, read_samples
from curation.tar.scan import SampleSpan, TarReport, TarScan, Window

__all__ = ["Sample", "SampleSpan", "TarReport", "TarScan", "TarWriter", "Window", "open_sample", "read_samples"]
