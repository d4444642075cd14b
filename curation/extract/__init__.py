"""Stage 06: scores and features of samples.

An **extractor** computes **columns** (one value a sample, in the parquet table) and **features** (vectors, in the npz);
a **preparation** is what extractors need of a sample and may share; a **directive** names an extractor in the YAML.
"""
