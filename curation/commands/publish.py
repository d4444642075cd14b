"""``curation publish FOLDER --repo user/name`` uploads a stage's outputs to a dataset repository."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from curation.commands.places import StagePlace, find_stages, stage_named
from curation.errors import EXIT_OK, EXIT_SHARDS_FAILED, EXIT_WORK_LEFT, UsageError
from curation.hub.push import GaveUp, Pushed, PushOptions, list_all, push
from curation.hub.repository import check_access, check_name
from curation.jsonio import clean_text, dump_json
from curation.options import POSITIONAL, URLS, exit_code, parse_arguments, say_error, set_up_logging

_SHOWN = 20  # of a list, without --json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Upload a stage's finished outputs to a dataset repository of the hub.  Start it again to go on."""

    folder: Annotated[Path, POSITIONAL]
    """The stage's output folder, or the dataset's with --stage."""
    repo: Annotated[str, URLS]
    """The dataset repository: user/name, or a name of your own.  Created as a private repository if it does not
    exist."""
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
    check_name(options.repo)
    if options.tries < 1:
        raise UsageError("--tries must be at least 1")
    place = _place(options)
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
            pushed = push(place.home, place.stage, options.repo, asked)
    except GaveUp as error:
        unseen = str(error)
    if unseen and options.dry_run:
        print(f"the repository's present files are not checked: {clean_text(unseen)}", file=sys.stderr)
        pushed = list_all(place.home, place.stage, options.repo, options.only)
    elif unseen:
        say_error(f"{unseen}.  Uploaded files stay: run the same command again to continue")
        return EXIT_WORK_LEFT
    print(dump_json(asdict(pushed)).decode() if options.json else _summary(pushed, dry_run=options.dry_run))
    return EXIT_SHARDS_FAILED if pushed.changed else EXIT_OK


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
