"""``curation publish FOLDER --to URL`` uploads a stage's outputs to a bucket, another filesystem or the hub."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

from curation.commands.places import StagePlace, find_stages, stage_named
from curation.errors import (
    EXIT_OK,
    EXIT_SHARDS_FAILED,
    EXIT_USAGE,
    EXIT_WORK_LEFT,
    InfrastructureError,
    UsageError,
    redact,
)
from curation.jsonio import clean_text, dump_json
from curation.options import (
    LISTED,
    POSITIONAL,
    URLS,
    at_least,
    exit_code,
    items_in,
    less_than,
    logger,
    more_than,
    parse_arguments,
    say_error,
    set_up_logging,
)
from curation.publish.backlog import Backlog
from curation.publish.open_store import open_store, refuse_own_folder, repository_in, store_name
from curation.publish.publisher import Foreign, Outcome, Publisher, PublisherOptions
from curation.publish.push import GaveUp, NothingFinished, Pushed, PushOptions, list_all, push_with_receipts
from curation.publish.repository import check_access, check_name
from curation.publish.running import KEEPS_ALL

_FULL_NAME = re.compile(r"\d\d_")  # of a stage
_SHOWN = 20  # of a list, without --json
_PAUSE_S = 3.0  # between two looks at what is new


@dataclass(frozen=True, kw_only=True)
class Options:
    """Upload a stage's finished outputs to a bucket, another filesystem or the hub.  Start it again to continue."""

    folder: Annotated[Path, POSITIONAL]
    """The stage's output folder, or the dataset's with --stage."""
    to: Annotated[str | None, URLS] = None
    """Where to upload: s3://bucket/folder, gs://bucket/folder, hf://datasets/user/name, or a path on another
    filesystem."""
    repo: Annotated[str | None, URLS] = None
    """The same as --to hf://datasets/REPO: user/name, or a name of your own.  Created as a private repository if it
    does not exist."""
    stage: str | None = None
    """The stage's name, as status shows it, if the folder has several stages."""
    only: tuple[str, ...] = ()
    """Only outputs whose paths in the folder match one of these patterns: 'parquet/*' 'shards/*'."""
    public: bool = False
    """Create the repository public.  An existing repository is not changed."""
    license: str | None = None
    """The licence for the card's metadata, by the hub's id: cc-by-4.0.  Default: the card's present licence, at first
    unknown."""
    prune: bool = False
    """Remove files from the repository whose shards are not (or no longer) in the folder."""
    keep_local: Literal["all", "receipts"] = "all"
    """receipts: remove the files of a shard from this filesystem when their upload is proved.  Not for hf://."""
    keep: Annotated[str | None, LISTED] = None
    """With --keep_local receipts: files whose paths in the folder match one of these patterns stay nevertheless."""
    overwrite: bool = False
    """Replace files in the store that were not put there from this folder.  A repository on the hub keeps all versions
    and needs no such flag."""
    until_eof: bool = False
    """Upload what is new again and again until standard input ends, then once more.  The stages start this."""
    lease_s: Annotated[float, at_least(1), less_than(1e6)] = 120.0
    """If the heartbeat of another publisher stops for this number of seconds, this one takes its shard."""
    stall_s: Annotated[float, more_than(0)] = 1800.0
    """A publisher that finishes no file for this number of seconds counts as hung."""
    dry_run: bool = False
    """List the files that would be uploaded, and upload nothing.  Without a token or the hub, all possible files are
    listed."""
    tries: int = 6
    """How often a failing step is tried before the command gives up."""
    quiet: bool = False
    """Only warnings and errors."""
    json: bool = False
    """One JSON object on one line."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "publish")
    set_up_logging(options.quiet)
    if options.tries < 1:
        raise UsageError("--tries must be at least 1")
    place = _place(options)
    if options.to is None and options.repo is None:
        raise UsageError("say where to publish: --to s3://bucket/folder, or --repo user/name")
    if options.to is not None and options.repo is not None:
        raise UsageError("--to and --repo are two places to publish to: give one, and start again for the other")
    repo = options.repo if options.to is None else repository_in(options.to)
    if repo is None:
        return _to_store(options, place, str(options.to))
    if options.to is None and "://" in repo:
        raise UsageError(f"--repo {redact(repo)} is a URL: type --to {redact(repo)}")
    check_name(repo)
    if options.keep_local == "receipts" or options.overwrite:
        raise UsageError("--keep_local and --overwrite are not for repositories on the hub: leave them out")
    return _repeat(options, place, lambda is_last: _to_hub(options, place, repo, is_last=is_last))


def _to_hub(options: Options, place: StagePlace, repo: str, *, is_last: bool) -> int:
    unseen = _unseen(options)
    asked = PushOptions(
        only=options.only,
        public=options.public,
        licence=options.license,
        prune=options.prune,
        dry_run=options.dry_run,
        tries=1 if options.dry_run else options.tries,
    )
    try:
        if not unseen:
            pushed = push_with_receipts(place.home, place.stage, repo, asked)
    except NothingFinished:
        if not options.until_eof:
            raise
        return EXIT_OK  # the stage beside it says what has become of the shards
    except GaveUp as error:
        unseen = str(error)
    if unseen and options.dry_run:
        print(f"the repository's present files are not checked: {clean_text(unseen)}", file=sys.stderr)
        pushed = list_all(place.home, place.stage, repo, options.only)
    elif unseen:
        say_error(f"{unseen}.  Uploaded files stay: run the same command again to continue")
        return EXIT_WORK_LEFT
    if is_last:
        print(dump_json(asdict(pushed)).decode() if options.json else _summary(pushed, dry_run=options.dry_run))
    return EXIT_SHARDS_FAILED if pushed.changed else EXIT_OK


def _to_store(options: Options, place: StagePlace, url: str) -> int:
    """Publish to a bucket or to another filesystem."""
    if options.only or options.public or options.license is not None:
        raise UsageError("--only, --public and --license are for repositories on the hub: leave them out")
    refuse_own_folder(url, place.home)
    with contextlib.closing(open_store(url)) as store:
        if options.dry_run:
            return _say_what_is_due(options, place, store.url, store_name(url))
        store.check()
        if options.keep_local == "receipts" and not store.conditional:
            logger.warning(f"{store.url}: {KEEPS_ALL}")
        asked = PublisherOptions(
            overwrite=options.overwrite,
            remove_local=options.keep_local == "receipts",
            kept=tuple(items_in(options.keep or "")),
            lease_s=options.lease_s,
            stall_s=options.stall_s,
        )
        stop = _Stop()
        publisher = Publisher(place.home, place.stage, store, store_name(url), asked, stopping=stop.is_set)

        def once(is_last: bool) -> int:
            outcome = publisher.go(is_last=is_last)
            if is_last and options.prune and not stop.is_set():
                publisher.prune()
            if is_last:
                print(dump_json(asdict(outcome)).decode() if options.json else _told(store.url, outcome))
            if outcome.left or stop.is_set():
                return EXIT_WORK_LEFT
            return EXIT_SHARDS_FAILED if outcome.changed else EXIT_OK

        return _repeat(options, place, once, stop)


def _say_what_is_due(options: Options, place: StagePlace, url: str, name: str) -> int:
    shards = files = size = 0
    for due in Backlog(place.home, place.stage, name).shards(everything=True):
        shards, files, size = shards + 1, files + len(due.outputs), size + due.size
    if options.json:
        print(dump_json({"url": url, "shards": shards, "files": files, "bytes": size}).decode())
    else:
        size_told = f"{files:,} files ({size / 1e6:,.1f} MB) of {shards:,} shards"
        print(f"{url}: {size_told} would be uploaded, with their receipts")
    return EXIT_OK


def _told(url: str, outcome: Outcome) -> str:
    words = [f"{outcome.shards:,} shards published: {outcome.files:,} files ({outcome.bytes / 1e6:,.1f} MB) uploaded"]
    if not (outcome.shards or outcome.files or outcome.adopted or outcome.left or outcome.changed):
        words = ["nothing to upload: all that is done in the folder is there already"]
    words += [f"{outcome.adopted:,} there already"] if outcome.adopted else []
    words += [f"{outcome.removed:,} removed from this filesystem"] if outcome.removed else []
    words += [f"{outcome.pruned:,} obsolete ones removed from the store"] if outcome.pruned else []
    words += [f"{outcome.left:,} shards left"] if outcome.left else []
    lines = _listed(outcome.changed, "left: not what its receipt says (any more)")
    return "\n".join([*lines, f"{url}: {', '.join(words)}"])


class _Stop:
    """Whether a signal has asked this process to end.  Uploads that are under way are finished first."""

    def __init__(self) -> None:
        self._asked = False  # no Event: a handler may interrupt a method of it that holds its lock
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
                signal.signal(name, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def is_set(self) -> bool:
        return self._asked


def _repeat(options: Options, place: StagePlace, once: Callable[[bool], int], stop: _Stop | None = None) -> int:
    """Publish once, or with ``--until_eof`` again and again until standard input ends, and then for the last time."""
    if not options.until_eof:
        return once(True)
    stop = stop or _Stop()
    ended = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        ended.set()

    threading.Thread(target=watch, name="eof", daemon=True).start()
    while not ended.is_set() and not stop.is_set():
        try:
            if place.receipts.is_dir():  # a stage may begin with something else, such as an index
                once(False)
        except Foreign:
            raise
        except InfrastructureError as error:  # the store may come back; the last time decides
            logger.warning(f"publishing: {clean_text(str(error))}")
        except Exception as error:  # noqa: BLE001 - a fault of this program: code 1 would say that files have changed
            logger.warning(f"publishing: {type(error).__name__}: {clean_text(str(error))}")
        ended.wait(_PAUSE_S)
    if stop.is_set():
        return EXIT_WORK_LEFT
    if not place.receipts.is_dir():
        return EXIT_OK  # the stage beside it says why it has done nothing
    try:
        return once(True)
    except (InfrastructureError, MemoryError, OSError, ImportError):
        raise
    except Exception:  # noqa: BLE001 - as above
        traceback.print_exc()
        return EXIT_USAGE


def _unseen(options: Options) -> str:
    """Why a dry run cannot ask the hub; empty where it can.  Raises UsageError where the real run could not upload."""
    try:
        check_access()
    except UsageError as error:
        if not options.dry_run:
            raise
        return str(error)
    return ""


def _place(options: Options) -> StagePlace:
    if options.until_eof and options.stage is not None and _FULL_NAME.match(options.stage):  # it may not have begun yet
        return StagePlace(options.stage, Path(os.path.realpath(options.folder)))
    if options.stage is not None:
        return stage_named(options.folder, options.stage)
    places = find_stages(options.folder)
    if len(places) > 1:
        names = ", ".join(clean_text(place.stage) for place in places[:5]) + (" …" if len(places) > 5 else "")
        if len({place.home for place in places}) > 1:
            raise UsageError(
                f"{options.folder}: the outputs of several stages lie below it ({names}): name the folder of one, such "
                f"as {places[0].home}"
            )
        raise UsageError(f"{options.folder}: has several stages ({names}): give --stage")
    return places[0]


def _summary(pushed: Pushed, *, dry_run: bool) -> str:
    would = "would be " if dry_run else ""
    lines = []
    if dry_run or pushed.removed or pushed.changed:
        lines += _listed(pushed.uploaded, "upload")
        lines += _listed(pushed.removed, "remove")
        lines += _listed(pushed.changed, "left: not what its receipt says (any more)")
    files = f"{len(pushed.uploaded):,} files ({pushed.bytes / 1e6:,.1f} MB) {would}uploaded"
    words = [files, f"{pushed.unchanged:,} there already"]
    words += [f"{len(pushed.removed):,} {would}removed"] if pushed.removed else []
    words += [f"the card {would}written"] if pushed.card else []
    words += [] if dry_run else [f"{pushed.commits:,} commits"]
    created = f" ({would or 'has been '}created)" if pushed.created else ""
    return "\n".join([*lines, f"{pushed.url}{created}: {', '.join(words)}"])


def _listed(paths: Sequence[str], what: str) -> list[str]:
    lines = [f"  {what}  {clean_text(path)}" for path in paths[:_SHOWN]]
    return lines + ([f"  … and {len(paths) - _SHOWN:,} more"] if len(paths) > _SHOWN else [])
