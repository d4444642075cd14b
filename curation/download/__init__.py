"""Stage 00: URL tables become shards.

A **table** lists URLs and captions, and is cut into shards; a **row** is one URL and its caption; a **downloader**
sends requests to many hosts at once, each within its limits; an **image policy** says what is stored of an image.
"""

from curation.download.columns import CaptionNames, NamedColumns
from curation.download.downloader import Downloader
from curation.download.fetch import FetchLimits, parse_networks
from curation.download.images import Check, Encode, ImagePolicy, ResizeFilter, ResizeMode
from curation.download.shard import OutputFormat, PreviousShard, RowDownloads, examine_by, refuse
from curation.download.tables import UrlTables
from curation.download.text_tables import TsvQuotes

__all__ = [
    "CaptionNames",
    "Check",
    "Downloader",
    "Encode",
    "FetchLimits",
    "ImagePolicy",
    "NamedColumns",
    "OutputFormat",
    "PreviousShard",
    "ResizeFilter",
    "ResizeMode",
    "RowDownloads",
    "TsvQuotes",
    "UrlTables",
    "examine_by",
    "parse_networks",
    "refuse",
]
