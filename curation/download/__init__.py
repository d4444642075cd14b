"""Stage 00: URL tables become shards.

A **table** lists URLs and captions, and is cut into shards; a **row** is one URL and its caption; a **downloader**
sends requests to many hosts at once, each within its limits; the **rules** of a site (scheme, host and port) say what
may be downloaded from it, and a **look-up** finds them; an **image policy** says what is stored of an image.
"""

from curation.download.columns import CaptionNames, NamedColumns
from curation.download.downloader import Downloader
from curation.download.fetch import FetchLimits, parse_networks
from curation.download.images import FILTERS, Check, Encode, ImagePolicy, ResizeFilter, ResizeMode
from curation.download.img2dataset import AdoptedFolder, Img2datasetOptions, listed, named_hash
from curation.download.opt_out import OPT_OUT_KINDS, OptOut, OptOutPolicy
from curation.download.rows import own_columns
from curation.download.shard import OutputFormat, PreviousShard, RowDownloads, examine_by, refuse
from curation.download.tables import TableKind, UrlTables
from curation.download.text_tables import TsvQuotes

__all__ = [
    "FILTERS",
    "OPT_OUT_KINDS",
    "AdoptedFolder",
    "CaptionNames",
    "Check",
    "Downloader",
    "Encode",
    "FetchLimits",
    "ImagePolicy",
    "Img2datasetOptions",
    "NamedColumns",
    "OptOut",
    "OptOutPolicy",
    "OutputFormat",
    "PreviousShard",
    "ResizeFilter",
    "ResizeMode",
    "RowDownloads",
    "TableKind",
    "TsvQuotes",
    "UrlTables",
    "examine_by",
    "listed",
    "named_hash",
    "own_columns",
    "parse_networks",
    "refuse",
]
