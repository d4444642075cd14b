#!/usr/bin/env python3
"""Stage 00: the images of URL tables → tar shards, each row of a table accounted for."""

import curation  # first: it refuses an old Python, and names packages that are missing

# isort: split

import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from curation.cluster import Allocation, run_id
from curation.download import (
    FILTERS,
    OPT_OUT_KINDS,
    AdoptedFolder,
    CaptionNames,
    Check,
    Downloader,
    Encode,
    FetchLimits,
    ImagePolicy,
    Img2datasetOptions,
    NamedColumns,
    OptOut,
    OptOutPolicy,
    OutputFormat,
    PreviousShard,
    ResizeFilter,
    ResizeMode,
    RowDownloads,
    TableKind,
    TsvQuotes,
    UrlTables,
    examine_by,
    listed,
    named_hash,
    own_columns,
    parse_networks,
    refuse,
)
from curation.download.again import Redo, requeue_all
from curation.errors import InfrastructureError, ShardError, UsageError, require
from curation.options import (
    FINITE,
    LISTED,
    Sources,
    also,
    at_least,
    between,
    less_than,
    logger,
    more_than,
    parse_options,
    set_up_logging,
    unless,
)
from curation.publish.running import published
from curation.run import Input, ShardContext, Stage, run_stage, stage_main
from curation.run.ledger import done_receipts
from curation.run.merge import merge_parquet, write_csv
from curation.run.output_folder import refuse_foreign_files
from curation.run.work import Later
from curation.run.workers import is_worker
from curation.shards import Shard
from curation.tar.random_access import write_sizes
from curation.tar.samples import MAX_MEMBER_BYTES

FULL_METADATA, SIMPLE_CSV = "full_metadata.parquet", "metadata.csv"
CSV_COLUMNS = ("key", "url", "caption", "width", "height", "original_width", "original_height", "sha256")
# Threads that look into images.  Several a CPU: on a node that others use as well, each gets its share.
EXAMINERS_PER_CPU, MAX_EXAMINERS = 4, 32
HASHES = ("sha256", "md5", "sha512", "sha1")
TOOL = "curation"
USER_AGENT = f"Mozilla/5.0 (compatible; {TOOL}/{curation.__version__})"
TOKEN = re.compile(r"[\w.-]+", re.ASCII)
DIRECTIVES = "noai,noimageai,noindex,noimageindex"
RULES = ("robots.txt", "TDMRep", "X-Robots-Tag")  # in the order of OPT_OUT_KINDS


@dataclass(frozen=True, kw_only=True)
class Options(Img2datasetOptions):
    """Download the images of URL tables into tar shards; any number of processes share the work."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "adopt": "output",
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
            "bbox_col": "--blur_faces recorded in stage 04, which blurs the faces of finished shards",
        }
    )

    input: Annotated[Sources, also("-i", "--url_list"), unless("adopt")]
    """URL tables (parquet, csv, tsv, jsonl, txt; text formats also .gz): one, a folder of them or a glob; local, or
    https://, hf:// or s3://."""
    output: Annotated[Path, also("-o", "--output_folder"), unless("adopt")]
    """Folder for the shards."""
    adopt: Path | None = None
    """Take over this folder of img2dataset: keep its whole samples byte for byte, and ask for its other rows again.
    Default of --output: the same folder."""
    output_format: OutputFormat = "webdataset"
    """webdataset: <shard>.tar.  files: img2dataset's layout, <shard>/<key>.jpg and so on."""
    rows_per_shard: Annotated[int, at_least(1), also("--number_sample_per_shard")] = 10_000
    """Rows of a table in one shard."""
    shard_digits: Annotated[int, at_least(1), less_than(19), also("--oom_shard_count")] = 8
    """Digits of a shard's number in its name."""
    input_format: TableKind | None = None
    """Only tables whose names end in this."""
    url_col: str | None = None
    """Column of the URLs.  Default: url, or a similar name."""
    caption_col: str | None = None
    """Column of the captions.  Default: caption, text, alt_text, title or a similar name."""
    save_additional_columns: Annotated[str | None, LISTED] = None
    """Of the table's other columns, only these.  Default: all of them."""
    caption_names: CaptionNames | None = None
    """few: without --caption_col, only caption and text are recognised.  Default: many; few in an output folder from
    0.2.0."""
    tsv_quotes: TsvQuotes | None = None
    """Quotation marks in a tsv.  Default: auto, which removes them around a whole field; csv in an output folder from
    0.2.0."""
    verify_hash: str | None = None
    """Column with the expected hash of the bytes, such as sha256 or md5=original_md5."""
    compute_hash: Literal["md5", "sha256", "sha512"] | None = "sha256"
    """md5, sha512: write a column with this hash of the downloaded bytes, beside the sha256."""
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
    encode: Annotated[Encode | None, also("--encode_format")] = None
    """keep: store each image byte for byte.  jpg, png, webp: decode it, rotate it upright, resize it, and store it in
    this format.  Default: jpg with --image_size, otherwise keep."""
    skip_reencode: bool = False
    """Store an image byte for byte if it has the format of --encode already and is not resized."""
    image_check: Check = "decode"
    """decode: an image fails if it cannot be decoded completely.  header: only if it is cut off or has no header."""
    image_size: Annotated[int, at_least(0)] = 0
    """Size in pixels of the side that --resize_mode selects."""
    resize_mode: ResizeMode | None = None
    """no, keep_ratio (the shorter side), keep_ratio_largest, center_crop, border (padded with white).  Default: border
    with --image_size, as in img2dataset."""
    resize_filter: Annotated[ResizeFilter | None, also("--downscale_interpolation")] = None
    """Filter for reducing images.  Default: hamming, nearest to the mean of the area; box in an output folder from
    0.2.0."""
    upscale_interpolation: ResizeFilter = "lanczos"
    """Filter for enlarging images."""
    resize_only_if_bigger: bool = False
    """Do not resize smaller images."""
    encode_quality: Annotated[int, between(0, 100)] = 95
    """Quality of JPEG and WebP; with --encode png its compression, from 0 to 9."""
    min_image_size: Annotated[int, at_least(0)] = 0
    """Refuse images whose shorter side has fewer pixels."""
    max_image_area: Annotated[float, more_than(0)] = float("inf")
    """Refuse images with more pixels."""
    max_aspect_ratio: Annotated[float, at_least(1)] = float("inf")
    """Refuse images if the ratio of the longer to the shorter side is larger than this."""
    user_agent: str = USER_AGENT
    """The User-Agent that is sent to the servers.  The default also holds --user_agent_token."""
    opt_out: OptOut | None = None
    """What sites say in robots.txt, TDMRep and X-Robots-Tag.  respect: do not download what they forbid.  record:
    download it and name the rule in the column opt_out.  ignore: only X-Robots-Tag counts.  Default: respect; ignore
    in an output folder from before 0.6."""
    user_agent_token: str = TOOL
    """The product token by which robots.txt and X-Robots-Tag may name this downloader."""
    disallowed_header_directives: str | None = None
    """Directives of X-Robots-Tag that forbid the use of an image; an empty text for none.  Default:
    noai,noimageai,noindex,noimageindex and, unless --opt_out is ignore, noml."""
    ignore_ssl_certificate: bool = False
    """Also accept images from servers with an invalid certificate."""
    allow_private: str = ""
    """Private networks to which requests may be sent, such as 10.1.0.0/16 for a mirror inside a site."""
    retry_failed_urls: bool = False
    """Download only the failed rows once more; good samples are copied byte for byte."""
    extract_exif: bool = True
    """Write the EXIF data of each image into the column exif."""
    verify: bool = False
    """Decode every stored image, download damaged ones again, and repair the tables."""
    max_error_rate: float = 1.0
    """A shard fails if a greater share of its rows fails.  Default: no shard fails for this, because many URLs no
    longer work."""

    workers: Annotated[int, at_least(1), less_than(1000), also("--processes_count")] = 1
    """Worker processes on this machine; they share the shards by claims."""

    def check(self) -> None:
        super().check()
        if self.resize_mode not in (None, "no") and not self.image_size and not self.disable_all_reencoding:
            raise UsageError(f"--resize_mode {self.resize_mode} needs --image_size (256 is img2dataset's default)")
        if self.image_size and self.encode == "keep":
            raise UsageError("--image_size needs --encode jpg: images that are kept byte for byte keep their size")
        low, high = (0, 9) if self.encode == "png" else (1, 100)
        if self.encode_quality not in range(low, high + 1):
            raise UsageError(f"--encode_quality must be between {low} and {high} with --encode {self.encode or 'jpg'}")
        try:
            parse_networks(self.allow_private)
        except ValueError as error:
            raise UsageError(f"--allow_private: {error}") from None
        if self.follow:
            raise UsageError("--follow: there is no stage before 00_download that it could follow")
        if self.rerun and (self.retry_failed_urls or self.verify):
            raise UsageError("--rerun downloads everything again: leave out --retry_failed_urls and --verify")
        if self.hash_to_verify is not None and self.hash_to_verify[0] not in HASHES:
            raise UsageError(f"--verify_hash {self.verify_hash}: hashes are {', '.join(HASHES)}")

    def as_meant(self) -> "Options":
        """The options with those of img2dataset in the words of this stage."""
        if self.user_agent == USER_AGENT and self.user_agent_token != TOOL and TOKEN.fullmatch(self.user_agent_token):
            agent = USER_AGENT.replace(TOOL, f"{self.user_agent_token}; {TOOL}")  # as img2dataset does
            return replace(self, user_agent=agent).as_meant()
        size, mode = self.image_size, self.resize_mode or ("border" if self.image_size else "no")
        rerun = self.rerun or self.incremental_mode == "overwrite"
        if self.disable_all_reencoding:
            return replace(self, encode="keep", image_check="header", image_size=0, resize_mode="no", rerun=rerun)
        encode = self.encode or ("jpg" if size else "keep")
        size = 0 if mode == "no" else size
        return replace(self, encode=encode, image_size=size, resize_mode=mode, rerun=rerun)

    @property
    def notes(self) -> list[str]:
        """What the user should know of these options."""
        if self.image_size and self.resize_mode is None and not self.disable_all_reencoding:
            return [*self.without_effect, "--image_size without --resize_mode: border, as in img2dataset"]
        return self.without_effect

    @property
    def is_in_place(self) -> bool:
        """Whether a folder is taken over where it lies."""
        return self.adopt is not None and os.path.realpath(self.adopt) == os.path.realpath(self.output)

    @property
    def digest(self) -> str | None:
        """The hash that is written beside the sha256."""
        return None if self.compute_hash == "sha256" else self.compute_hash

    @property
    def columns(self) -> list[str] | None:
        """The table's further columns that are kept; None for all."""
        return None if self.save_additional_columns is None else listed(self.save_additional_columns)

    @property
    def hash_to_verify(self) -> tuple[str, str] | None:
        """(hash, column)."""
        return named_hash(self.verify_hash)

    @property
    def looks_up(self) -> bool:
        """Whether the rules of sites are looked up."""
        return self.opt_out in ("respect", "record")

    @property
    def directives(self) -> str:
        """Those of X-Robots-Tag that count."""
        given = self.disallowed_header_directives
        return (f"{DIRECTIVES},noml" if self.looks_up else DIRECTIVES) if given is None else given

    @property
    def again(self) -> list[Redo]:
        wanted: dict[Redo, bool] = {"urls": self.retry_failed_urls, "images": self.verify}
        return [what for what, asked in wanted.items() if asked]

    def policy(self) -> ImagePolicy:
        reduce, enlarge = self.resize_filter or "hamming", self.upscale_interpolation
        return ImagePolicy(
            self.encode or "keep",
            self.image_size,
            self.resize_mode or "no",
            self.resize_only_if_bigger,
            self.encode_quality,
            self.min_image_size,
            self.max_aspect_ratio,
            self.image_check,
            filter=FILTERS.get(reduce, reduce),
            enlarge=FILTERS.get(enlarge, enlarge),
            skip_reencode=self.skip_reencode,
            max_area=self.max_image_area,
        )

    def limits(self) -> FetchLimits:
        directives = (word.lower() for word in listed(self.directives))
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
        "opt_out": Later(before="ignore", now="respect"),
    }
    gone: ClassVar[frozenset[str]] = frozenset({"publish_to"})  # before 0.6.0 objects were written in the commit
    shards_in_flight = 2  # while the slowest URLs of one are waited for, the next one's are asked

    def __init__(self, options: Options, tables: "UrlTables | AdoptedFolder") -> None:
        super().__init__(options, options.output)
        self.tables = tables
        self._adopted = tables if isinstance(tables, AdoptedFolder) else None
        self.digest = options.digest if self._adopted is None else options.digest or self._adopted.digest_name
        self._own = own_columns(exif=options.extract_exif, digest=self.digest, opt_out=options.looks_up)

    @classmethod
    def settled(cls, options: Options, output: "str | Path | None" = None) -> Options:
        return super().settled(options.as_meant(), output)

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        names = (
            "output_format", "rows_per_shard", "url_col", "caption_col", "caption_names", "tsv_quotes", "verify_hash",
            "encode", "image_check", "image_size", "resize_mode", "resize_filter", "resize_only_if_bigger",
            "encode_quality", "min_image_size", "max_image_bytes", "opt_out",
        )  # fmt: skip
        ratio = None if o.max_aspect_ratio == float("inf") else o.max_aspect_ratio
        named: dict[str, object] = {name: getattr(o, name) for name in names}
        named["disallowed_header_directives"] = o.directives
        named["resize_filter"] = FILTERS.get(o.resize_filter or "hamming", o.resize_filter)
        if self._adopted is not None:  # its rows are what they are, whether or not the tables are given too
            of_tables = ("rows_per_shard", "url_col", "caption_col")
            named = {"adopt": True} | {name: value for name, value in named.items() if name not in of_tables}
        return {"tables": self.tables.digest(), "max_aspect_ratio": ratio, **named, **self._younger()}

    def _younger(self) -> dict[str, object]:
        """Options that output folders of older versions do not record, where they are not as they were then."""
        o = self.options
        kept = None if o.columns is None else sorted(o.columns)
        area = None if o.max_image_area == float("inf") else o.max_image_area
        enlarge = FILTERS.get(o.upscale_interpolation, o.upscale_interpolation)
        found: dict[str, tuple[object, object]] = {
            "shard_digits": (o.shard_digits, 8),
            "save_additional_columns": (kept, None),
            "compute_hash": (self.digest, None),
            "upscale_interpolation": (enlarge, "lanczos"),
            "skip_reencode": (o.skip_reencode, False),
            "max_image_area": (area, None),
            "extract_exif": (o.extract_exif, True),
        }
        return {name: value for name, (value, before) in found.items() if value != before}

    def inputs(self, shard: Shard) -> list[Input]:
        if self._adopted is not None:  # a folder that is taken over where it lies changes by that
            return [] if self.options.is_in_place else self._adopted.inputs(shard.id)
        return [Input(shard.path)] if self.tables.is_local else []

    @classmethod
    def require(cls, options: Options) -> None:
        require("aiohttp", *(["protego"] if options.looks_up else []))

    def open(self, allocation: Allocation) -> None:
        o = self.options
        self._threads = allocation.threads
        self._downloader = Downloader(
            o.limits(),
            examine_by(o.policy(), self.digest),
            refuse,
            per_host=o.per_host,
            retries=o.retries,
            max_wait_s=o.max_wait,
            threads=min(MAX_EXAMINERS, EXAMINERS_PER_CPU * allocation.threads),
            opt_out=self._opt_out(),
        )
        self._pool = ThreadPoolExecutor(allocation.threads, "verify")

    def _opt_out(self) -> "OptOutPolicy | None":
        o = self.options
        if not o.looks_up:
            return None
        if o.user_agent_token.lower() not in o.user_agent.lower():
            logger.warning(
                f"--user_agent {o.user_agent!r} does not hold {o.user_agent_token!r}, so sites cannot know it"
            )
        return OptOutPolicy(o.opt_out == "respect", o.user_agent_token, self.output / "_opt_out")

    def close(self) -> None:
        if hasattr(self, "_downloader"):
            self._downloader.close()
            self._pool.shutdown()
        self._finish_tables()

    # ---- one shard

    def result(self, counts: Mapping[str, int]) -> str:
        found = f"{counts['kept']:,} pictures stored, {counts['failed']:,} not available"
        rules = [(name, counts[f"opt_out_{kind}"]) for kind, name in zip(OPT_OUT_KINDS, RULES, strict=True)]
        told = ", ".join(f"{count:,} by {name}" for name, count in rules if count)
        if told:
            done = "disallowed" if self.options.opt_out == "respect" else "stored although disallowed"
            found += f"; {done}: {told}"
        return found

    def process(self, work: ShardContext) -> None:
        again = self._again(work)
        if not again:
            self._process(work, None if self._adopted is None else self._taken_over(work, self._adopted), ["urls"])
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
        in_order = self._adopted is None
        earlier = PreviousShard.of_receipt(
            self.output, self.name, work.shard.id, work.previous or {}, self._own, in_order=in_order
        )
        with work.phase("decode"):
            as_it_came = self.options.encode == "keep" and not self.options.skip_reencode and in_order
            earlier.check(self._pool, self._threads, decode="images" in again, as_it_came=as_it_came)
        if earlier.lost:
            work.note("unsound", len(earlier.lost))
            key, why = next(iter(earlier.lost.items()))
            work.warn(f"{len(earlier.lost)} stored samples are damaged and are downloaded again: {key} ({why}) …")
        return earlier

    def _taken_over(self, work: ShardContext, adopted: "AdoptedFolder") -> PreviousShard:
        """What img2dataset has stored of a shard; its images are decoded, and the damaged ones asked for again."""
        earlier = adopted.earlier(work.shard.id)
        with work.phase("decode"):
            earlier.check(self._pool, self._threads, decode=True, as_it_came=False)
        if earlier.lost:
            work.note("unsound", len(earlier.lost))
        return earlier

    def _process(self, work: ShardContext, earlier: PreviousShard | None, again: list[str]) -> None:
        with work.phase("read"):
            table = self.tables.read(work.shard.id)
        o = self.options
        rows = RowDownloads(work, table, o.rows_per_shard, o.hash_to_verify, o.columns, self._own)
        if earlier is not None:
            rows.take_over(earlier, ask_failed="urls" in again)
        log = work.partial("again" if earlier is not None else "")
        rows.download(self._downloader, log)
        with work.phase("write"):
            replaces = self._adopted is not None and o.is_in_place and self._adopted.has_tar(work.shard.id)
            rows.write(self.output, o.output_format, log, replaces=replaces)
        work.note("recipe", self._recipe)
        lacking = "" if self._adopted is None else self._adopted.lacking(work.shard.id, table.table.num_rows)
        if lacking:
            work.warn(lacking)

    @cached_property
    def _recipe(self) -> str:
        return self.ledger(read_only=True).fingerprint

    # ---- what is made of all shards

    def _finish_tables(self) -> None:
        ledger = self.ledger(read_only=True)
        if merge_parquet(ledger, lambda shard_id: f"{shard_id}.parquet", FULL_METADATA, self._write_csv):
            self._write_sizes()

    def _write_sizes(self) -> None:
        """Say for open_clip how many samples each tar has."""
        if self.options.output_format == "webdataset":
            done = (receipt for receipt in done_receipts(self.output, self.name) if receipt.get("status") == "done")
            write_sizes(self.output, {f"{receipt['shard']}.tar": receipt["counts"]["kept"] for receipt in done})

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


def check_name(options: Options) -> None:
    """Raise UsageError unless sites can name this downloader; say so where they cannot know how."""
    token = options.user_agent_token
    if not options.looks_up:
        return
    if not TOKEN.fullmatch(token):
        raise UsageError("--user_agent_token must be a name of letters, digits, '.', '_' and '-'")
    if token.lower() not in options.user_agent.lower() and not is_worker():
        set_up_logging(options.quiet)
        logger.warning(
            f"--user_agent {options.user_agent} does not hold {token}, by which sites are to name it: add it"
        )


def find_tables(options: Options, notes: Sequence[str] = ()) -> UrlTables | AdoptedFolder:
    """The tables of --input, or the folder of --adopt.  notes: what else the user should know."""
    adopted = None if options.adopt is None else adopted_folder(options, options.adopt)
    found = url_tables(options, options.shard_digits if adopted is None else adopted.digits) if options.input else None
    if adopted is not None and found is not None:
        adopted.use(found)
    tables = adopted or found
    if tables is None:
        raise UsageError("--input is missing: a table of URLs")
    begun = (options.output / "_receipts" / Download.name).exists()
    if adopted is not None and not options.image_size and not begun:
        notes = [*notes, *adopted.resized()]
    notes = [*notes, *tables.notes]
    if notes and not is_worker():
        set_up_logging(options.quiet)
        for note in notes:
            logger.warning(note)
    return tables


def adopted_folder(options: Options, folder: Path) -> "AdoptedFolder":
    if options.hash_to_verify is not None and not options.input:
        raise UsageError("--verify_hash with --adopt needs --input: the folder does not hold the expected hashes")
    adopted = AdoptedFolder(folder, options.rows_per_shard)
    if options.is_in_place and adopted.image_column:
        raise UsageError(f"--adopt {folder}: its images are in its tables: give another folder as --output, for tars")
    if options.is_in_place and adopted.layout != options.output_format:
        raise UsageError(
            f"--adopt {folder}: its samples are stored as {adopted.layout}: give --output_format {adopted.layout}, or "
            "another folder as --output"
        )
    return adopted


def url_tables(options: Options, digits: int) -> UrlTables:
    hashed = options.hash_to_verify
    columns = NamedColumns(
        options.url_col,
        options.caption_col,
        hashed[1] if hashed else None,
        options.caption_names or "many",
        None if options.columns is None else tuple(options.columns),
    )
    return UrlTables(
        options.input,
        options.output,
        options.rows_per_shard,
        columns,
        tsv_quotes=options.tsv_quotes or "auto",
        digits=digits,
        kind=options.input_format or "",
        dry=options.dry_run,
    )


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv)
    options.check()
    notes = options.notes
    options = Download.settled(options)
    check_name(options)
    tables = find_tables(options, notes)
    shards = tables.shards()
    stage = Download(options, tables)
    ids = {shard.id for shard in shards}
    loose = "--output_format files writes a file for each sample" if options.output_format == "files" else ""

    def run() -> int:
        if not options.is_in_place:
            refuse_foreign_files(stage.output, stage.name, ids, rerun=options.rerun)
        prepare_again(stage, options, ids)
        return run_stage(stage, options, shards)

    return published(options, stage, run, kept=("*.parquet",), needed_by=loose)


if __name__ == "__main__":
    sys.exit(main())
