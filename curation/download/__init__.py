"""Stage 00: URL tables become shards.

A **table** lists URLs and captions, and is cut into shards; a **row** is one URL and its caption; a **downloader**
sends requests to many hosts at once, each within its limits; an **image policy** says what is stored of an image.
"""

from curation.download.downloader import Downloader
from curation.download.fetch import FetchLimits, parse_networks
from curation.download.images import Check, Encode, ImagePolicy, ResizeFilter, ResizeMode
from curation.download.shard import OutputFormat, PreviousShard, RowDownloads, examine_by, refuse
from curation.download.tables import NamedColumns, UrlTables, caption_column_of, url_column_of

__all__ = [
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
    "UrlTables",
    "caption_column_of",
    "examine_by",
    "parse_networks",
    "refuse",
    "url_column_of",
]
