"""Outputs that appear whole or not at all, and the commit that only one attempt at a shard can win.

Every output is written under a temporary name in its own folder, or as an upload that is not completed yet, and hashed
as it is written.  The commit is a hard link that only one attempt of a generation can create, followed by renames and
completions that anyone can finish after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, LostClaim
from curation.jsonio import dump_json
from curation.storage.buckets import complete_upload
from curation.storage.files import (
    _TRIES,
    _own_file_error,
    _write_durably,
    fsync_folder,
    read_record,
    storage_error,
    temporary_name,
)


class Commit:
    """The commit of one shard in the receipts folder of one stage.

    root: the stage's output folder, which every path in a receipt is relative to.  folder: the bucket of receipts.
    named: whether a valid record may name this attempt's temporary files, which must then stay for whoever finishes it.
    """

    def __init__(self, root: Path, folder: Path, shard_id: str) -> None:
        self._root = root
        self._folder = folder
        self._shard_id = shard_id
        self.receipt_path = folder / f"{shard_id}.json"
        self.named = False

    def read_receipt(self) -> dict[str, Any] | None:
        """The shard's receipt, None where there is none (or one that is no receipt: the shard is then done again)."""
        return read_record(self.receipt_path)

    def write(self, receipt: dict[str, Any]) -> None:
        """Publish the outputs that ``receipt`` names, and the receipt last.  Its outputs are durable under their
        temporary names already.  Raises LostClaim when another attempt won."""
        token, generation = str(receipt["token"]), int(receipt["generation"])
        prepared = self.prepared(token)
        try:
            _write_durably(prepared, dump_json(receipt, indent=True))
            winner = self._link(prepared, self.record(generation), receipt)
        except BaseException as error:
            if not self.named:
                with contextlib.suppress(OSError):
                    prepared.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _own_file_error(prepared, error) from error
            raise
        try:
            if self._finish(self.record(generation), winner) and winner.get("token") == token:
                return  # nobody else can have renamed our receipt: it stood there, whatever has followed it since
            final = self.read_receipt()
            if final is not None and final.get("token") == token:
                return
            self.named = False  # whoever won, a record of ours is void from here on
            prepared.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.receipt_path, error) from error
        raise LostClaim(f"shard {self._shard_id}: another attempt committed first")

    def finish_pending(self, after_generation: int = 0, names: Iterable[str] | None = None) -> bool:
        """Finish a commit that a dead process left; whether there was any.

        A valid record has the generation that follows the receipt's: only that one is looked for, or those among
        ``names`` of the folder.
        """
        if names is None:
            records = [self.record(after_generation + 1)]
        else:
            prefix = f".{self._shard_id}."
            middles = [n[len(prefix) : -7] for n in names if n.startswith(prefix) and n.endswith(".commit")]
            records = [self.record(int(middle)) for middle in middles if middle.isdecimal()]
        found = False
        for record in records:
            value = read_record(record)
            if value is not None:
                found = True
                try:
                    self._finish(record, value)
                except OSError as error:
                    raise storage_error(self.receipt_path, error) from error
        return found

    def _link(self, prepared: Path, record: Path, receipt: dict[str, Any]) -> dict[str, Any]:
        """Step 2: the receipt of the attempt that holds the record, which is this one if it could be linked."""
        for _ in range(_TRIES):
            try:
                self.named = True
                os.link(prepared, record)
                return receipt
            except FileExistsError:
                self.named = False
                winner = read_record(record)
                if winner is not None:
                    self.named = winner.get("token") == receipt["token"]  # the answer to our link was lost on its way
                    return winner
                # Finished in between.  Going on without a record of our own would be unsafe: link it, and step 3
                # finds it void.
                time.sleep(0.001)
            except FileNotFoundError:
                self.named = False
                raise LostClaim(f"shard {self._shard_id}: its files were cleared; another attempt won") from None
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    self.named = False
                    raise InfrastructureError(
                        f"{self._folder}: this filesystem has no hard links ({error.strerror}), and commits need them"
                    ) from error
                raise
        raise InfrastructureError(f"{record}: is no record of a commit; move it away and start again")

    def _finish(self, record: Path, value: dict[str, Any]) -> bool:
        """Steps 3 and 4, which any process may take, in this order, at any time, any number of times.

        Returns whether this call put the receipt in its place; False where another had, or the record was void.
        """
        current = self.read_receipt()  # after the record was read
        if current is not None and int(current.get("generation", 0)) >= int(value["generation"]):
            record.unlink(missing_ok=True)
            return False
        folders: set[Path] = set()
        for output in value.get("outputs", []):
            if "upload" in output:
                complete_upload(output)
                continue
            final = self._root / output["path"]
            with contextlib.suppress(FileNotFoundError):  # renamed already
                os.rename(final.with_name(output["temporary"]), final)
            folders.add(final.parent)
        for folder in folders:
            fsync_folder(folder)
        published = False
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.prepared(str(value["token"])), self.receipt_path)
            published = True
        fsync_folder(self._folder)
        record.unlink(missing_ok=True)
        return published

    def prepared(self, token: str) -> Path:
        """The receipt of an attempt before it is committed."""
        return self._folder / temporary_name(self._shard_id, token)

    def record(self, generation: int) -> Path:
        return self._folder / f".{self._shard_id}.{generation}.commit"
