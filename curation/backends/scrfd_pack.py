"""insightface's pack of models, out of which the detector SCRFD is taken."""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from pathlib import Path

from curation.errors import InfrastructureError
from curation.models.weights import hub_error_line, megabytes, open_url, save, sha256_of

MAX_PACK_BYTES = 1 << 30  # buffalo_l.zip has 275 MB
MAX_GRAPH_BYTES = 512 << 20  # its detector has 17 MB
_BLOCK = 1 << 20


def fetch_scrfd(url: str, model: Path, *, dry_run: bool = False) -> None:
    """The detector out of insightface's pack ``url``, as the file ``model``; needs no token.

    Only that file is taken out of the archive, whatever else is in it; nobody sees half of it.
    """
    print("insightface's pretrained packs are for non-commercial research only; no token is needed")
    if model.is_file():
        print(f"{model}: is there ({megabytes(model.stat().st_size)}), nothing to fetch")
        return
    response = open_url(url)
    with response:
        stated = response.headers.get("Content-Length", "")
        size = int(stated) if stated.isdigit() else None
        about = "of unknown size" if size is None else megabytes(size)
        if dry_run:
            print(f"{url}: {about}, would be fetched for {model.name} in it, which goes to {model}")
            return
        print(f"{url}: fetching {about}", flush=True)
        archive = model.with_name(f".pack.{secrets.token_hex(8)}.tmp")
        try:
            model.parent.mkdir(parents=True, exist_ok=True)
            with open(archive, "xb") as file:
                save(response, file, url, MAX_PACK_BYTES, "the pack")
            _take_out(archive, model, url)
        except OSError as error:
            raise InfrastructureError(f"{model}: cannot be written ({error.strerror or error})") from error
        finally:
            archive.unlink(missing_ok=True)
    print(f"{model}: {megabytes(model.stat().st_size)}, sha256 {sha256_of(model)}")


def _take_out(archive: Path, model: Path, url: str) -> None:
    """The member with the model's name, in whatever folder of the archive it is."""
    temporary = model.with_name(f".{model.name}.{secrets.token_hex(8)}.tmp")
    try:
        with zipfile.ZipFile(archive) as pack:
            members = [member for member in pack.infolist() if member.filename.rpartition("/")[2] == model.name]
            if len(members) != 1 or members[0].file_size > MAX_GRAPH_BYTES:
                raise InfrastructureError(f"{url}: holds no {model.name} of a plausible size; that is not the pack")
            with pack.open(members[0]) as source, open(temporary, "xb") as target:
                shutil.copyfileobj(source, target, _BLOCK)  # zipfile checks the size and the checksum
                target.flush()
                os.fsync(target.fileno())
        os.replace(temporary, model)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InfrastructureError(f"{url}: a damaged archive ({hub_error_line(error)}); start again") from error
    finally:
        temporary.unlink(missing_ok=True)
