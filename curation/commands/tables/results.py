"""A command's result that goes to a store: written into a folder of this filesystem, and sent when it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from curation.errors import InfrastructureError, UsageError, redact
from curation.options import PATH, url_in
from curation.publish.open_store import open_store
from curation.publish.store import Moved, Stamp, Upload
from curation.storage.files import fast_digest, make_folder

_OURS = "curation-result"  # the token in the stamp of such a file
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """Where a result is made that goes to a store."""

    work_dir: Annotated[str | None, PATH] = None
    """With a URL as --out: a folder on this filesystem in which the file is made before it is uploaded."""
    overwrite: bool = False
    """With a URL as --out: replace a file in the store that no such command has put there."""


Options = TypeVar("Options", bound=ResultOptions)


@contextlib.contextmanager
def results_in_stores(options: Options, names: Sequence[str] = ("out",)) -> Iterator[Options]:
    """Let a command write its results to files, and send those whose option is a URL when the block ends.

    Args:
        options: The command's options; the named ones are paths, or None.
        names: The options that name results.

    Yields:
        The options with paths of this filesystem.

    Raises:
        UsageError: An option is a URL, and ``--work_dir`` is missing; or the store cannot be written to.
        InfrastructureError: The store refuses, or somebody else's file is there.
    """
    targets = {name: url for name in names if (url := url_in(getattr(options, name)))}
    if not targets:
        if options.work_dir is not None:
            raise UsageError("--work_dir is for a result that is a URL: leave it out")
        yield options
        return
    if options.work_dir is None:
        name, target = next(iter(targets.items()))
        raise UsageError(
            f"--{name} {redact(target)} is a URL: add --work_dir FOLDER, a folder on this filesystem in which the "
            "file is made"
        )
    folder = Path(options.work_dir)
    make_folder(folder)
    places = {name: folder / _file_name(name, target) for name, target in targets.items()}
    if len(set(places.values())) < len(places):
        raise UsageError(f"--{' and --'.join(places)} are two files of one name: give them two names")
    for target in targets.values():
        with contextlib.closing(open_store(target.rpartition("/")[0])) as store:
            store.check()
    yield dataclasses.replace(options, **places)  # type: ignore[arg-type]
    for name, target in targets.items():
        _send(places[name], target, overwrite=options.overwrite)


def as_given(value: Path) -> str:
    """A result's place for messages: a URL without secrets, or a path."""
    return redact(url_in(value)) or str(value)


def _file_name(option: str, target: str) -> str:
    name = target.rpartition("/")[2]
    if not name or name in (".", "..") or "\0" in name or target.count("/") < 3:
        raise UsageError(f"--{option} {redact(target)}: give the name of a file, such as s3://bucket/folder/keep.npy")
    return name


def _send(file: Path, target: str, *, overwrite: bool) -> None:
    folder, _, name = target.rpartition("/")
    with contextlib.closing(open_store(folder)) as store:
        store.check()
        digest, size = fast_digest(file), file.stat().st_size
        stamp = Stamp(digest, 1, _OURS)
        for _ in range(_TRIES):
            there = store.look(name)
            foreign = there is not None and (there.stamp is None or there.stamp.token != _OURS)
            if foreign and store.guards and not overwrite:
                raise InfrastructureError(
                    f"{redact(target)}: another file is there; give another name, or --overwrite.  The result is in "
                    f"{file}"
                )
            replaces = (there.version if there is not None else "") if store.conditional else None
            with contextlib.suppress(Moved):
                store.send([Upload(name, file, size, stamp, replaces)])
                return
    raise InfrastructureError(f"{redact(target)}: it changes again and again; the result is in {file}")
