#!/usr/bin/env python3
"""Stage 00: the images of URL tables → tar shards, each row of a table accounted for."""

import curation  # first: it refuses an old Python, and names packages that are missing

# isort: split

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar

from curation.cluster import Allocation, run_id
from curation.download import (
    CaptionNames,
    Check,
    Downloader,
    Encode,
    FetchLimits,
    ImagePolicy,
    NamedColumns,
    OutputFormat,
    PreviousShard,
    ResizeFilter,
    ResizeMode,
    RowDownloads,
    TsvQuotes,
    UrlTables,
    examine_by,
    parse_networks,
    refuse,
)
from curation.download.again import Redo, requeue_all
from curation.errors import InfrastructureError, ShardError, UsageError
from curation.options import (
    FINITE,
    URLS,
    Sources,
    also,
    at_least,
    between,
    exit_code,
    logger,
    more_than,
    parse_options,
    set_up_logging,
)
from curation.run import Input, RunOptions, ShardContext, Stage, run_stage
from curation.run.merge import merge_parquet, write_csv
from curation.run.output_folder import refuse_foreign_files
from curation.run.work import Later
from curation.run.workers import is_worker
from curation.shards import Shard
from curation.storage.buckets import Folder, remote_folder
from curation.tar.samples import MAX_MEMBER_BYTES

FULL_METADATA, SIMPLE_CSV = "full_metadata.parquet", "metadata.csv"
CSV_COLUMNS = ("key", "url", "caption", "width", "height", "original_width", "original_height", "sha256")
# Threads that look into images.  Several a CPU: on a node that others use as well, each gets its share.
EXAMINERS_PER_CPU, MAX_EXAMINERS = 4, 32
HASHES = ("sha256", "md5", "sha512", "sha1")


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Download the images of URL tables into tar shards; any number of processes share the work."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "publish_to": "output",
            "url_col": "table",
            "threads": "network",
            "max_image_bytes": "image",
            "user_agent": "permission",
            "retry_failed_urls": "repair",
        }
    )
    example: ClassVar[str] = "--input urls.parquet --output shards"
    instead: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "processes_count": "--workers",
        }
    )

    input: Annotated[Sources, also("-i", "--url_list")]
    """URL tables (parquet, csv, tsv, jsonl, txt; text formats also .gz): one, a folder of them or a glob; local, or
    https://, hf:// or s3://."""
    output: Annotated[Path, also("-o", "--output_folder")]
    """Folder for the shards."""
    publish_to: Annotated[str | None, URLS] = None
    """Write the tars to this place in a bucket (s3://bucket/folder, gs://…); all other files go to --output."""
    output_format: OutputFormat = "webdataset"
    """webdataset: <shard>.tar.  files: img2dataset's layout, <shard>/<key>.jpg and so on."""
    rows_per_shard: Annotated[int, at_least(1), also("--number_sample_per_shard")] = 10_000
    """Rows of a table in one shard."""
    url_col: str | None = None
    """Column of the URLs.  Default: url, or a similar name."""
    caption_col: str | None = None
    """Column of the captions.  Default: caption, text, alt_text, title or a similar name."""
    caption_names: CaptionNames | None = None
    """few: without --caption_col, only caption and text are recognised.  Default: many; few in an output folder from
    0.2.0."""
    tsv_quotes: TsvQuotes | None = None
    """Quotation marks in a tsv.  Default: auto, which removes them around a whole field; csv in an output folder from
    0.2.0."""
    verify_hash: str | None = None
    """Column with the expected hash of the bytes, such as sha256 or md5=original_md5."""
    threads: Annotated[int, at_least(1), also("--thread_count")] = 256
    """Number of simultaneous requests of one process."""
    per_host: Annotated[int, at_least(1)] = 16
    """Largest number of simultaneous requests to one host."""
    timeout: Annotated[float, more_than(0), FINITE] = 20.0
    """Time limit of one try in seconds, from the DNS query to the last byte."""
    retries: Annotated[int, at_least(0)] = 2
    """Further tries of a URL if its server is busy or closes the connection."""
    max_wait: Annotated[float, at_least(0)] = 60.0
    """Longest Retry-After that the stage waits for, in seconds."""
    max_image_bytes: Annotated[int, between(1, MAX_MEMBER_BYTES // 2)] = 64 << 20
    """Largest size of an image in bytes."""
    encode: Encode = "keep"
    """keep: store each image byte for byte.  jpg: decode it, rotate it upright, resize it, and store it as JPEG."""
    image_check: Check = "decode"
    """decode: an image fails if it cannot be decoded completely.  header: only if it is cut off or has no header."""
    image_size: Annotated[int, at_least(0)] = 0
    """With --encode jpg: size in pixels of the side that --resize_mode selects."""
    resize_mode: ResizeMode = "no"
    """no, keep_ratio (the shorter side), keep_ratio_largest, center_crop, border (padded with white)."""
    resize_filter: ResizeFilter | None = None
    """Filter for reducing images.  Default: hamming, nearest to the mean of the area; box in an output folder from
    0.2.0."""
    resize_only_if_bigger: bool = False
    """Do not resize smaller images."""
    encode_quality: Annotated[int, between(1, 100)] = 95
    """JPEG quality."""
    min_image_size: Annotated[int, at_least(0)] = 0
    """Refuse images whose shorter side has fewer pixels."""
    max_aspect_ratio: Annotated[float, at_least(1)] = float("inf")
    """Refuse images if the ratio of the longer to the shorter side is larger than this."""
    user_agent: str = f"Mozilla/5.0 (compatible; curation/{curation.__version__})"
    """The User-Agent that is sent to the servers."""
    user_agent_token: str = "curation"  # noqa: S105 - a name
    """The name that an X-Robots-Tag may use for rules that apply only to this downloader."""
    disallowed_header_directives: str = "noai,noimageai,noindex,noimageindex"
    """Directives of X-Robots-Tag that forbid the use of an image; an empty text for none."""
    ignore_ssl_certificate: bool = False
    """Also accept images from servers with an invalid certificate."""
    allow_private: str = ""
    """Private networks to which requests may be sent, such as 10.1.0.0/16 for a mirror inside a site."""
    retry_failed_urls: bool = False
    """Download only the failed rows once more; good samples are copied byte for byte."""
    verify: bool = False
    """Decode every stored image, download damaged ones again, and repair the tables."""
    max_error_rate: float = 1.0
    """A shard fails if a greater share of its rows fails.  Default: no shard fails for this, because many URLs no
    longer work."""

    def check(self) -> None:
        super().check()
        if (self.resize_mode != "no") != (self.image_size > 0):
            raise UsageError("--image_size and --resize_mode need each other")
        if self.image_size and self.encode == "keep":
            raise UsageError("--image_size needs --encode jpg: images that are kept byte for byte keep their size")
        try:
            parse_networks(self.allow_private)
        except ValueError as error:
            raise UsageError(f"--allow_private: {error}") from None
        if self.follow:
            raise UsageError("--follow: there is no stage before 00_download that it could follow")
        if self.publish_to is not None and self.output_format == "files":
            raise UsageError("--publish_to takes tars: --output_format files would make an object of every file")
        if self.rerun and (self.retry_failed_urls or self.verify):
            raise UsageError("--rerun downloads everything again: leave out --retry_failed_urls and --verify")
        if self.hash_to_verify is not None and self.hash_to_verify[0] not in HASHES:
            raise UsageError(f"--verify_hash {self.verify_hash}: hashes are {', '.join(HASHES)}")

    @property
    def hash_to_verify(self) -> tuple[str, str] | None:
        """(hash, column)."""
        name, _, column = (self.verify_hash or "").partition("=")
        return (name, column or name) if name else None

    @property
    def again(self) -> list[Redo]:
        wanted: dict[Redo, bool] = {"urls": self.retry_failed_urls, "images": self.verify}
        return [what for what, asked in wanted.items() if asked]

    def policy(self) -> ImagePolicy:
        return ImagePolicy(
            self.encode,
            self.image_size,
            self.resize_mode,
            self.resize_only_if_bigger,
            self.encode_quality,
            self.min_image_size,
            self.max_aspect_ratio,
            self.image_check,
            filter=self.resize_filter or "hamming",
        )

    def limits(self) -> FetchLimits:
        directives = (word.strip().lower() for word in self.disallowed_header_directives.split(","))
        return FetchLimits(
            timeout_s=self.timeout,
            max_bytes=self.max_image_bytes,
            connections=self.threads,
            user_agent=self.user_agent,
            user_agent_token=self.user_agent_token,
            disallowed=frozenset(filter(None, directives)),
            allowed_networks=parse_networks(self.allow_private),
            check_certificates=not self.ignore_ssl_certificate,
        )


class Download(Stage[Options]):
    """One shard: a run of a table's rows → <shard>.tar (or <shard>/), <shard>.parquet, <shard>_stats.json."""

    name = "00_download"
    later: ClassVar[Mapping[str, Later]] = {
        "resize_filter": Later(before="box", now="hamming"),
        "caption_names": Later(before="few", now="many"),
        "tsv_quotes": Later(before="csv", now="auto"),
    }
    shards_in_flight = 2  # while the slowest URLs of one are waited for, the next one's are asked

    def __init__(self, options: Options, tables: UrlTables) -> None:
        super().__init__(options, options.output)
        self.tars: Folder = options.output if options.publish_to is None else remote_folder(options.publish_to)
        self.tables = tables

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        names = (
            "output_format", "rows_per_shard", "url_col", "caption_col", "caption_names", "tsv_quotes", "verify_hash",
            "encode", "image_check", "image_size", "resize_mode", "resize_filter", "resize_only_if_bigger",
            "encode_quality", "min_image_size", "max_image_bytes", "disallowed_header_directives",
        )  # fmt: skip
        ratio = None if o.max_aspect_ratio == float("inf") else o.max_aspect_ratio
        named: dict[str, object] = {name: getattr(o, name) for name in names}
        place = {} if o.publish_to is None else {"publish_to": str(self.tars)}
        return {"tables": self.tables.digest(), "max_aspect_ratio": ratio, **named, **place}

    def inputs(self, shard: Shard) -> list[Input]:
        return [Input(shard.path)] if self.tables.is_local else []

    def open(self, allocation: Allocation) -> None:
        o = self.options
        self._threads = allocation.threads
        self._downloader = Downloader(
            o.limits(),
            examine_by(o.policy()),
            refuse,
            per_host=o.per_host,
            retries=o.retries,
            max_wait_s=o.max_wait,
            threads=min(MAX_EXAMINERS, EXAMINERS_PER_CPU * allocation.threads),
        )
        self._pool = ThreadPoolExecutor(allocation.threads, "verify")

    def close(self) -> None:
        if hasattr(self, "_downloader"):
            self._downloader.close()
            self._pool.shutdown()
        self._finish_tables()

    # ---- one shard

    def result(self, counts: Mapping[str, int]) -> str:
        return f"{counts['kept']:,} pictures stored, {counts['failed']:,} not available"

    def process(self, work: ShardContext) -> None:
        again = self._again(work)
        if not again:
            self._process(work, None, again)
            return
        try:
            self._process(work, self._earlier(work, again), again)
        except ShardError as error:  # a failed receipt would cost the samples that are there
            raise InfrastructureError(f"{error}; what is there of shard {work.shard.id} is left as it is") from error

    def _again(self, work: ShardContext) -> list[str]:
        """What this attempt is to do of a shard that was done with the same options."""
        previous = work.previous or {}
        same = previous.get("notes", {}).get("recipe") == self._recipe and previous.get("inputs") == list(work.inputs)
        return list(previous.get("again", ())) if previous.get("status") == "retry" and same else []

    def _earlier(self, work: ShardContext, again: list[str]) -> PreviousShard:
        earlier = PreviousShard(self.output, work.shard.id, work.previous or {}, self.options.output_format)
        with work.phase("decode"):
            as_it_came = self.options.encode == "keep"
            earlier.check(self._pool, self._threads, decode="images" in again, as_it_came=as_it_came)
        if earlier.lost:
            work.note("unsound", len(earlier.lost))
            key, why = next(iter(earlier.lost.items()))
            work.warn(f"{len(earlier.lost)} stored samples are damaged and are downloaded again: {key} ({why}) …")
        return earlier

    def _process(self, work: ShardContext, earlier: PreviousShard | None, again: list[str]) -> None:
        with work.phase("read"):
            table = self.tables.read(work.shard.id)
        o = self.options
        rows = RowDownloads(work, table, o.rows_per_shard, o.hash_to_verify)
        if earlier is not None:
            rows.take_over(earlier, ask_failed="urls" in again)
        log = work.partial("again" if earlier is not None else "")
        rows.download(self._downloader, log)
        with work.phase("write"):
            rows.write(self.output, self.tars, o.output_format, log)
        work.note("recipe", self._recipe)

    @cached_property
    def _recipe(self) -> str:
        return self.ledger(read_only=True).fingerprint

    # ---- what is made of all shards

    def _finish_tables(self) -> None:
        ledger = self.ledger(read_only=True)
        merge_parquet(ledger, lambda shard_id: f"{shard_id}.parquet", FULL_METADATA, self._write_csv)

    def _write_csv(self, merged: Path) -> None:
        write_csv(merged, self.output / SIMPLE_CSV, CSV_COLUMNS, ("status", "success"))


def prepare_again(stage: Download, options: Options, ids: set[str]) -> None:
    """Make shards pending for --retry_failed_urls and --verify, once a run."""
    if not options.again or options.dry_run or is_worker() or not (stage.output / "_receipts" / stage.name).exists():
        return
    ledger = stage.ledger()
    ledger.enter("", False, None, sorted(ids))
    counts = requeue_all(ledger, ids, options.again, run_id())
    logger.info(f"{counts['retry']:,} shards to check again")
    left = counts["claimed"] + counts["lost"]
    if left:
        logger.warning(f"{left:,} shards are being processed by a worker: start again when it has finished")


def find_tables(options: Options) -> UrlTables:
    hashed = options.hash_to_verify
    columns = NamedColumns(
        options.url_col, options.caption_col, hashed[1] if hashed else None, options.caption_names or "many"
    )
    tables = UrlTables(
        options.input,
        options.output,
        options.rows_per_shard,
        columns,
        tsv_quotes=options.tsv_quotes or "auto",
        dry=options.dry_run,
    )
    if tables.notes and not is_worker():
        set_up_logging(options.quiet)
        for note in tables.notes:
            logger.warning(note)
    return tables


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    options.check()
    options = Download.settled(options)
    tables = find_tables(options)
    shards = tables.shards()
    stage = Download(options, tables)
    ids = {shard.id for shard in shards}
    for place in dict.fromkeys((stage.output, stage.tars)):
        refuse_foreign_files(stage.output, place, stage.name, ids, rerun=options.rerun)
    prepare_again(stage, options, ids)
    return run_stage(stage, options, shards)


if __name__ == "__main__":
    sys.exit(main())
