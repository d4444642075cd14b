"""Stage 06: scores and features of samples.

An **extractor** computes **columns** (one value a sample, in the parquet) and **features** (vectors, in the npz).  A
**directive** is the name of an extractor in the YAML; a **family** makes the extractors of its directives, and the
**catalogue** finds the family of each.  A **preparation** is what extractors need of one sample and may share; the
**loader** runs preparations ahead of the models in **worker processes**.  A shard's **spool** keeps the batches that
are computed.
"""

from curation.extract.api import Batch, Column, Extractor, Feature, Preparation, SampleFacts
from curation.extract.catalogue import Catalogue
from curation.extract.compute import Extraction, SpooledShard
from curation.extract.config import FLAGS, KEYS, ExtractConfig, read_config
from curation.extract.feed import WANTED, ExtractLoader, ExtractSample, extract_sample
from curation.extract.outputs import INTEGER, MetadataTable, import_arrow, write_npz, write_parquet
from curation.extract.settings import ModelSettings, Precision

__all__ = [
    "FLAGS",
    "INTEGER",
    "KEYS",
    "WANTED",
    "Batch",
    "Catalogue",
    "Column",
    "ExtractConfig",
    "ExtractLoader",
    "ExtractSample",
    "Extraction",
    "Extractor",
    "Feature",
    "MetadataTable",
    "ModelSettings",
    "Precision",
    "Preparation",
    "SampleFacts",
    "SpooledShard",
    "extract_sample",
    "import_arrow",
    "read_config",
    "write_npz",
    "write_parquet",
]
