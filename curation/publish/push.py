"""``push`` uploads the parts of a stage's output folder to a dataset repository of the hub, each once.

What must be done follows from the receipts and from what the repository holds, compared by content.  So a push may be
broken off at any moment, repeated, and made by several processes at once: each commit names the one it was made on top
of, and a process that comes too late lists the repository again.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from curation.errors import UsageError
from curation.jsonio import clean_text, dump_json
from curation.publish.backlog import Backlog
from curation.publish.card import write_card
from curation.publish.open_store import store_name
from curation.publish.parts import Collection, ContentLog, addition_of, collect, path_in_repository
from curation.publish.repository import CARD, Addition, Conflict, Head, Repository, Retryable, connect
from curation.run.records import upload_receipt
from curation.shards import is_safe_id
from curation.storage.files import make_folder, storage_errors, write_whole
from curation.storage.retry import RetryPolicy

logger = logging.getLogger("curation")

MAX_COMMIT_FILES = 200
MAX_COMMIT_BYTES = 32 << 30  # uploaded before they are committed: as much may be left for the next push
MAX_COMMIT_SMALL_BYTES = 64 << 20  # of files that are sent inside the commit itself
_SMALL_BYTES = 10 << 20  # the hub takes no larger files inside a commit
MAX_CONFLICTS = 20  # in a row
LONGEST_WAIT_S = 600.0  # a hub that asks for more is left alone
_RETRIES = RetryPolicy(first_wait_s=1.5, longest_wait_s=90.0)
_CONFLICTS = RetryPolicy(first_wait_s=1.0, longest_wait_s=10.0)


class NothingFinished(UsageError):
    """No shard is finished, so that there is nothing to upload yet."""


class GaveUp(Exception):
    """The hub failed too often in a row; the next push goes on where this one ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How to push.

    Attributes:
        only: Patterns of paths in the folder; without any, all outputs.
        public: Whether a repository that the push creates is public.
        licence: For the card, one of the hub's ids; None for what it was.
        prune: Remove parts from the repository whose shards the folder does not have any more.
        dry_run: Upload nothing.
        tries: Of the same step, before the push gives up.
    """

    only: Sequence[str] = ()
    public: bool = False
    licence: str | None = None
    prune: bool = False
    dry_run: bool = False
    tries: int = 6


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or would do with ``dry_run``.

    Attributes:
        repo: The repository's name.
        url: Its address.
        uploaded: Paths in the repository.
        bytes: Of what was uploaded.
        unchanged: Parts that were there already.
        removed: Paths that ``prune`` removed.
        changed: Files that are not what their receipt says (any more); the next push reads them again.
        card: Whether the card was written.
        created: Whether the repository did not exist.
        commits: How many were made.
    """

    repo: str
    url: str
    uploaded: tuple[str, ...] = ()
    bytes: int = 0
    unchanged: int = 0
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    card: bool = False
    created: bool = False
    commits: int = 0


def push(
    home: Path,
    stage: str,
    repo: str,
    options: PushOptions | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload what the repository lacks of a stage's output folder.

    Args:
        home: The stage's output folder.
        stage: The stage's name.
        repo: The dataset repository, ``user/name`` or ``name``.
        options: How to push.
        sleep: How to wait between tries.

    Raises:
        GaveUp: The hub failed too often in a row.
        NothingFinished: There is no finished shard.
        UsageError: Nothing can be uploaded: a wrong name, no token.
        InfrastructureError: The hub refuses it, or files cannot be read.
    """
    with connect(repo) as repository:
        return _Push(home.absolute(), stage, repository, options or PushOptions(), sleep).go()


def push_with_receipts(home: Path, stage: str, repo: str, options: PushOptions | None = None) -> Pushed:
    """Push, and write the receipts of the uploads, by which every command knows that the repository has the shards.

    Args, Returns and Raises: as for ``push``.
    """
    options = options or PushOptions()
    home = home.absolute()
    if "/" not in repo and not options.dry_run:
        with connect(repo) as repository:
            repo = repository.name
    url = f"hf://datasets/{repo}"
    # Read before the push: what is committed later is left to the next one.
    due = () if options.dry_run or options.only else tuple(Backlog(home, stage, store_name(url)).shards())
    pushed = push(home, stage, repo, options)
    log = ContentLog(home / "_hub" / f"{stage}.contents.jsonl")
    for shard in due:
        parts = {
            path_in_repository(path): output
            for output in shard.outputs
            if not (path := str(output["path"])).startswith(("_", "../"))
        }
        if not parts.keys().isdisjoint(pushed.changed):
            continue
        files = []
        for name, output in parts.items():
            known = log.known(int(output["size"]), str(output["digest"]))
            checksum = f"sha256:{known}" if known else ""
            files.append(
                {"name": name, "size": output["size"], "version": "", "checksum": checksum, "digest": output["digest"]}
            )
        record = {
            "store": url, "stage": stage, "shard": shard.shard_id, "generation": shard.generation,
            "token": shard.receipt.get("token"), "files": files,
        }  # fmt: skip
        place = upload_receipt(home, store_name(url), stage, shard.shard_id, shard.generation)
        make_folder(place.parent)
        with storage_errors(place):
            write_whole(place, dump_json(record, indent=True))
    return pushed


def list_all(home: Path, stage: str, repo: str, only: Sequence[str] = ()) -> Pushed:
    """What a push to an empty repository would upload, found without a token and without a network.

    Args:
        home: The stage's output folder.
        stage: The stage's name.
        repo: The dataset repository, which is not asked.
        only: Patterns of paths in the folder; without any, all outputs.

    Raises:
        NothingFinished: There is no finished shard.
        InfrastructureError: Files cannot be read.
    """
    home = home.absolute()
    found = collect(home, stage)
    wanted = found.matching(only)
    if not wanted:
        raise NothingFinished(f"{home}: {stage} has no finished shard to upload (of --only, if given)")
    log = ContentLog(home / "_hub" / f"{stage}.contents.jsonl")
    additions = {path: log.addition(found.parts[path]) for path in wanted}
    log.save()
    parts = [part for part in additions.values() if part is not None]
    return Pushed(
        repo,
        repo,
        uploaded=tuple(part.path for part in parts),
        bytes=sum(part.size for part in parts),
        changed=tuple(path for path, part in additions.items() if part is None),
        card=True,
    )


class _Push:
    def __init__(
        self, home: Path, stage: str, repository: Repository, options: PushOptions, sleep: Callable[[float], None]
    ) -> None:
        self._home, self._stage = home, stage
        self._repository = repository
        self._options = options
        self._retries = _Retries(options.tries, sleep)
        self._wanted: list[str] = []
        self._log = ContentLog(home / "_hub" / f"{stage}.contents.jsonl")
        self._done = Pushed(repository.name, repository.url)

    def go(self) -> Pushed:
        found = collect(self._home, self._stage)
        self._wanted = found.matching(self._options.only)
        if not self._wanted:
            raise NothingFinished(f"{self._home}: {self._stage} has no finished shard to upload (of --only, if given)")
        if found.elsewhere or found.unnamed:
            logger.warning(
                f"not uploaded: {found.elsewhere:,} files outside of {self._home}, {found.unnamed:,} whose names the "
                "hub does not take"
            )
        head: Head | None = None
        missing: Iterator[Addition] = iter(())
        while True:
            try:
                if head is None:
                    head = self._head()
                    missing = self._missing(found, head)
                if self._options.dry_run:
                    return self._listed(found, head, missing)
                additions, deletions, last = self._step(found, head, missing)
                if not additions and not deletions:
                    return self._done
                message = _message(self._stage, additions, deletions)
                head = self._repository.commit(head, additions, deletions, message)
                self._note(additions, deletions)
                self._retries.relax()
                if last:
                    return self._done
            except (Retryable, Conflict) as error:
                head = None
                self._retries.wait(error)

    def _head(self) -> Head:
        head = self._repository.head()
        if head is None and not self._options.dry_run:
            self._repository.create(public=self._options.public)
            self._done = replace(self._done, created=True)
            head = self._repository.head()
            if head is None:
                raise Retryable(f"{self._repository.name}: created, and not there yet")
        if head is None:
            self._done = replace(self._done, created=True)
        return head or Head("", {})

    def _step(
        self, found: Collection, head: Head, missing: Iterator[Addition]
    ) -> tuple[list[Addition], list[str], bool]:
        """What the next commit adds and removes, and whether it is the last one, which brings the card."""
        additions: list[Addition] = []
        small = size = 0
        for addition in missing:
            additions.append(addition)
            size += addition.size
            small += addition.size if addition.size <= _SMALL_BYTES else 0
            if len(additions) >= MAX_COMMIT_FILES or size >= MAX_COMMIT_BYTES or small >= MAX_COMMIT_SMALL_BYTES:
                self._log.save()
                return additions, [], False
        self._log.save()
        deletions = self._gone(found, head)[:MAX_COMMIT_FILES] if self._options.prune else []
        if len(deletions) == MAX_COMMIT_FILES:
            return additions, deletions, False
        card = self._card(found, head, additions, deletions)
        return additions + ([] if card.is_in(head.files) else [card]), deletions, True

    def _missing(self, found: Collection, head: Head) -> Iterator[Addition]:
        """Parts that the repository lacks or has with other content; files that are not as published are left out."""
        uploaded = set(self._done.uploaded)
        changed, unchanged = [], 0
        for path in self._wanted:
            addition = self._log.addition(found.parts[path])
            if addition is None:
                changed.append(path)
            elif not addition.is_in(head.files):
                yield addition
            elif path not in uploaded:  # by this push, before a conflict
                unchanged += 1
        self._done = replace(self._done, changed=tuple(changed), unchanged=unchanged)

    def _gone(self, found: Collection, head: Head) -> list[str]:
        """Files of the repository that are named like parts and whose shards the folder does not have any more."""
        kinds = {_kind(path) for path in self._wanted}
        return sorted(path for path in head.files.keys() - found.parts.keys() if _kind(path) in kinds)

    def _card(self, found: Collection, head: Head, additions: Sequence[Addition], deletions: Sequence[str]) -> Addition:
        """The card of all that the repository will hold, which may be more than this push uploads."""
        there = (head.files.keys() | {addition.path for addition in additions}) - set(deletions)
        before = self._repository.card(head)
        text = write_card(before, found.within(there), self._home, self._stage, self._options.licence)
        return addition_of(CARD, text.encode("utf-8"))

    def _note(self, additions: Sequence[Addition], deletions: Sequence[str]) -> None:
        parts = [addition for addition in additions if addition.path != CARD]
        self._done = replace(
            self._done,
            uploaded=(*self._done.uploaded, *(part.path for part in parts)),
            bytes=self._done.bytes + sum(part.size for part in parts),
            removed=(*self._done.removed, *deletions),
            card=self._done.card or len(parts) < len(additions),
            commits=self._done.commits + 1,
        )
        logger.info(f"{self._repository.name}: {len(self._done.uploaded):,} files, {self._done.bytes / 1e6:,.1f} MB")

    def _listed(self, found: Collection, head: Head, missing: Iterator[Addition]) -> Pushed:
        """What a push would do, all of it."""
        parts = list(missing)
        self._log.save()
        gone = self._gone(found, head) if self._options.prune else []
        return replace(
            self._done,
            uploaded=tuple(part.path for part in parts),
            bytes=sum(part.size for part in parts),
            removed=tuple(gone),
            card=not self._card(found, head, parts, gone).is_in(head.files),
        )


class _Retries:
    """Counts the failures in a row, waits after each, and gives up when there were too many."""

    def __init__(self, tries: int, sleep: Callable[[float], None]) -> None:
        self._tries = tries
        self._sleep = sleep
        self._failures = self._conflicts = 0

    def relax(self) -> None:
        """Something was committed."""
        self._failures = self._conflicts = 0

    def wait(self, error: Retryable | Conflict) -> None:
        """Wait before the next try.  Raises GaveUp after the last one."""
        if isinstance(error, Conflict):
            self._conflicts += 1
            if self._conflicts >= MAX_CONFLICTS:
                raise GaveUp(f"{error}, {MAX_CONFLICTS} times in a row") from error
            self._sleep(_CONFLICTS.wait_s(self._conflicts))
            return
        self._failures += 1
        if self._failures >= self._tries:
            raise GaveUp(f"{error}; tried {self._failures} times") from error
        pause_s = _RETRIES.wait_s(self._failures)
        if error.after_s is not None:
            if error.after_s > LONGEST_WAIT_S:
                raise GaveUp(f"{error} and asks to wait {error.after_s:,.0f} s") from error
            pause_s = error.after_s + random.uniform(0.1, 1.0)
        logger.warning(f"{error}; trying again in {pause_s:.1f} s")
        self._sleep(pause_s)


def _message(stage: str, additions: Sequence[Addition], deletions: Sequence[str]) -> str:
    parts = sum(addition.path != CARD for addition in additions)
    words = [f"add {parts:,} files"] if parts else []
    words += [f"remove {len(deletions):,}"] if deletions else []
    return f"{clean_text(stage)}: {', '.join(words or ['the card'])}"


def _kind(path: str) -> tuple[str, int, str] | None:
    """A part's folder, depth and suffix; None for files that are not named like parts."""
    pure = PurePosixPath(path)
    if len(pure.parts) < 2 or not is_safe_id(pure.stem):
        return None
    return pure.parts[0], len(pure.parts), pure.suffix
