"""Whether the folders of a run belong together, and the call for one tar.

A wrong folder must not end as a run in which nothing had to be replaced: both write the same shards.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from curation.edits import EDIT_PARTS, LooseEditReader
from curation.errors import ShardError, UsageError
from curation.jsonio import KEY_SUFFIX, read_dictionary
from curation.reshard.select import ReshardInputs
from curation.run.inputs import check_made_by, receipts_of
from curation.shards import TAR, Shard, local_folders, record_path
from curation.storage.files import names_in, read_record
from curation.tar.scan import TarScan

FACES_STAGE: Final = "01_filter_noface"  # its metadata lies in the folder of the edits


def of_one_tar(
    output: str, edits: str | None, prompts: str | None, shards: Sequence[Shard]
) -> tuple[str, str | None, str | None]:
    """Turn the names of one shard's own files and folders into those of the folders of all shards.

    ``--input x.tar --output out/x.tar --edits edits/x`` is the call for one tar.  It means the same as ``--input x.tar
    --output out --edits edits``, so that calls for other tars, and one for all of them, go on in the same ``out/``.

    Args:
        output, edits, prompts: As they were given.
        shards: The source shards.

    Returns:
        The three folders.

    Raises:
        UsageError: ``output`` is named like a tar, and another one would be written.
    """
    own = shards[0].id if len(shards) == 1 and "/" not in shards[0].id else None
    target = Path(output)
    if target.name.lower().endswith((".tar.gz", ".tgz")) and not target.is_dir():
        raise UsageError(f"--output {output}: shards are written as <shard>{TAR}, not packed: give a folder")
    if target.name.endswith(TAR) and not target.is_dir():
        if own is None:
            raise UsageError(f"--output {output} names one tar, and --input {len(shards):,} shards: give a folder")
        if target.name != f"{own}{TAR}":
            raise UsageError(f"--output {output}: the shard of {shards[0].path} is written as {own}{TAR}; name it so")
        output = str(target.parent)
    if own is None:
        return output, edits, prompts
    if prompts is not None and Path(prompts).name == f"{own}.json" and Path(prompts).is_file():
        prompts = str(Path(prompts).parent)
    return output, None if edits is None else _edits_of_all(Path(edits), own), prompts


def _edits_of_all(given: Path, own: str) -> str:
    """The folder of all shards' edits, if ``given`` are the edits of the shard ``own`` alone; else ``given``."""
    if not given.name:  # ``.``, in the shard's own folder
        given = given.absolute()
    if given.name == f"{own}{TAR}" and given.is_file():
        return str(given.parent)
    holds_shards = any((given / name).exists() for name in (f"{own}{TAR}", own, "_receipts"))
    if given.name == own and given.parent.is_dir() and not holds_shards:
        return str(given.parent)
    if given.is_dir() and not holds_shards and _holds_edit_files(given):
        raise UsageError(f"--edits {given} holds loose files of one shard: its folder must be named {own}")
    return str(given)


def check_folders(
    sources: ReshardInputs, shards: Sequence[Shard], everything: Sequence[Shard], *, may_come: bool
) -> None:
    """Raise UsageError if the folders of edits and prompts are not what they are taken for.

    Args:
        sources: The folders.
        shards: The source shards of this run.
        everything: All source shards that were found.
        may_come: Edits that are not there yet may still come (``--follow``).
    """
    if sources.prompts is not None:
        check_made_by("--prompts", *sources.prompts)
    if sources.edits is not None:
        _check_edits(sources, *sources.edits, everything, may_come=may_come)
    if not may_come and sources.prompts is not None:
        _check_has_prompts(*sources.prompts, shards)
        _check_prompted(sources, shards)


def _check_edits(
    sources: ReshardInputs, folder: Path, stage: str, everything: Sequence[Shard], *, may_come: bool
) -> None:
    """Raise UsageError if the folder is another stage's, that of the sources, or holds no edit of any shard."""
    check_made_by("--edits", folder, stage, beside=(FACES_STAGE,))
    if Path(os.path.realpath(folder)) in local_folders(everything):
        raise UsageError("--edits must not be the folder of the source shards: they would replace themselves")
    if may_come:
        return
    if receipts_of(folder, stage) is None and not _holds_edits(folder, {s.id for s in everything}, sources.layout):
        what = {"tar": f"<shard>{TAR}", "files": "<shard>/"}.get(sources.layout, f"<shard>{TAR} nor <shard>/")
        raise UsageError(
            f"--edits: {folder} holds no edit of any shard (no {what}, and no receipt of {stage}): run stage 03 first, "
            "give the folder that it wrote, or leave --edits out if nothing is to be replaced"
        )


def _check_has_prompts(folder: Path, stage: str, shards: Sequence[Shard]) -> None:
    """Raise UsageError if there are prompts of no shard at all.  If stage 02 ran there, shards without are blocked."""
    if receipts_of(folder, stage) is None and not (
        any(name.endswith(".json") and name[0] not in "._" for name in names_in(folder))
        or any((folder / f"{shard.id}.json").is_file() for shard in shards if "/" in shard.id)
    ):
        raise UsageError(
            f"--prompts: {folder} holds the prompts of no shard (no <shard>.json, and no receipt of {stage}): run "
            "stage 02 first, or give the folder that it wrote"
        )


def _check_prompted(sources: ReshardInputs, shards: Sequence[Shard]) -> None:
    """Raise UsageError if prompts name samples of these shards, and not one of them has an edit.

    A shard for which stage 03 has a receipt is in order: it says what happened to the prompts.  One without is blocked
    if stage 03 ran in this folder, and the run says so.
    """
    if sources.edits is None or sources.prompts is None:
        return
    (folder, stage), named, example = sources.edits, 0, ""
    receipts = receipts_of(folder, stage)
    for shard in shards:
        if receipts is not None:
            receipt = read_record(record_path(receipts, shard.id))
            if receipt is not None and receipt.get("status") == "done":
                return
            continue
        prompts = sources.prompts[0] / f"{shard.id}.json"
        with contextlib.suppress(ShardError):  # the shard itself will fail, or is blocked
            keys = {name.removesuffix(KEY_SUFFIX) for name in read_dictionary(prompts)}
            if keys and _has_edit_of(sources, shard.id, keys):
                return
            named, example = named + len(keys), example or (f"{prompts}: {min(keys)}" if keys else "")
    if named:
        raise UsageError(
            f"--edits: {folder} has an edit of none of the {named:,} samples that --prompts names (such as {example}): "
            "run stage 03 for these shards first, or give the folders that belong together"
        )


def _has_edit_of(sources: ReshardInputs, shard_id: str, keys: set[str]) -> bool:
    """Whether one of these samples has an edit.  Raises ShardError if the edits cannot be read."""
    folder = sources.edits[0] if sources.edits is not None else Path()
    tar = folder / f"{shard_id}{TAR}"
    if sources.layout != "files" and tar.is_file():
        for window in TarScan(tar).windows():
            for span in window.spans:
                if span.key in keys and {member.suffix for member in span.members} >= {*EDIT_PARTS}:
                    return True
        return False
    return sources.layout != "tar" and not keys.isdisjoint(LooseEditReader(folder / shard_id, None).keys())


def _holds_edits(folder: Path, ids: Collection[str], layout: str) -> bool:
    """Whether there is a tar of edits, or a folder that is named like a shard or holds files as of an edit."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] in "._":
                    continue
                if layout != "files" and entry.name.endswith(TAR) and entry.is_file():
                    return True
                if layout != "tar" and entry.is_dir() and (entry.name in ids or _holds_edit_files(Path(entry.path))):
                    return True
    except OSError as error:
        raise UsageError(f"--edits: {folder}: cannot be listed ({error.strerror})") from None
    nested = (folder / shard_id for shard_id in ids if "/" in shard_id)
    return any(
        (layout != "tar" and own.is_dir()) or (layout != "files" and own.with_name(f"{own.name}{TAR}").is_file())
        for own in nested
    )


def _holds_edit_files(folder: Path) -> bool:
    """Whether there are files as of an edit: .jpg, .txt and .json."""
    lacking = {*EDIT_PARTS}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            lacking.discard(entry.name.rpartition(".")[2])
            if not lacking:
                return True
    return False
