"""What DataComp's baselines need beside the tables: where each file is on this machine, and how it is fetched.

The addresses and digests of DataComp's own files are those of its ``baselines/utils.py``.  WordNet 3.0 is Debian's
package ``wordnet-base``: its synsets have the numbers that ImageNet's list means; those of later versions differ.
"""

from __future__ import annotations

import importlib.util
import os
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from curation import PROGRAM
from curation.errors import InfrastructureError, UsageError, install
from curation.models.weights import CACHE, cached, fetch_weights, sha256_of
from curation.storage.files import storage_errors

_DATACOMP = "https://github.com/sagadre/datacomp_baseline_assets/releases/download/v0.1.0-alpha/"
_DEBIAN_WORDNET = "/usr/share/wordnet"
WORDNET_FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in ("adj", "adv", "noun", "verb"))
WORDNET_FILES += ("adj.exc", "adv.exc", "noun.exc", "verb.exc")
_MAX_WORDNET_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class Asset:
    """A published file.  flag: the option that names another one in its place."""

    flag: str
    url: str
    sha256: str

    @property
    def path(self) -> Path:
        """Its place in the cache, whether it is there or not."""
        return cached(self.url, self.sha256, CACHE)

    def find(self, command: str) -> Path:
        """Returns the fetched file.

        Args:
            command: The command that fetches it, for the message.

        Raises:
            InfrastructureError: It was not fetched.
        """
        if not self.path.is_file():
            name = self.url.rpartition("/")[2]
            raise InfrastructureError(
                f"{self.flag}: {name} is not on this machine; `{command}` fetches it, or name one"
            )
        return self.path

    def fetch(self, *, dry_run: bool) -> None:
        there = self.path.is_file()
        if dry_run:
            print(f"{self.flag}: {self.url}, {'is there' if there else 'would be fetched'}")
        else:
            print(f"{self.flag}: {fetch_weights(self.url, self.sha256, CACHE, name=self.flag)}", flush=True)


LANGUAGE_MODEL = Asset(
    "--lid_model",
    "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin",
    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e",
)
SYNSETS = Asset(
    "--synsets",
    f"{_DATACOMP}imagenet21k_wordnet_ids.txt",
    "66362bdedf36d933382edca5493fc562dcc17128ce36403c9e730a75f48cb2f2",
)
CENTROIDS: Mapping[str, Asset] = MappingProxyType(
    {
        scale: Asset("--centroids", f"{_DATACOMP}{scale}_centroids_l14.pt", sha256)
        for scale, sha256 in {
            "small": "23c66a05e49ad77283c1e2b33355c7eb088ac332a944c97ff85d5dfd48a5b251",
            "medium": "028b1721b1d0f139c565b6b0ac99f8a1756f4bae89c36b0ec6d1c6ea9b6f112d",
            "large": "04eeab1069d3540c246cf7ce69323147351a474017fc472e4c50a018ca32240b",
            "xlarge": "3f62e5f8ae3a715ce84e422846fcfce1536d184455ea234790c4a6465c4c6726",
        }.items()
    }
)
IMAGENET = tuple(
    Asset("--targets", f"{_DATACOMP}in1k_clip_vit_l14_{number}.pt", sha256)
    for number, sha256 in enumerate(
        (
            "304990fd492f40ba90072b80af78d6e8edcab9d042476ef513e03441cf53743b",
            "72f008e6aa3bfb54174fa322963215337f843fc90fd642a9dccc815dd9e7ee76",
            "83c3cc6503b8a50a22cac7023ca6cd61b130ab9725db2a7519f1bec5cabf5493",
            "83faa289f847799ddcd438e5b74df1cb5973c345674896d10ba31ea48bc63804",
            "067a45f4a140a93371876510a2fd9198a89ac1d194ae4063a51b45a6da69cadf",
        )
    )
)
_WORDNET_PACKAGE = Asset(
    "--wordnet",
    "https://deb.debian.org/debian/pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)


def find_synsets(path: Path | None, command: str) -> Path:
    """The list of ImageNet-21k's synsets: ``path``, or the fetched one, or the same file inside the package timm, which
    is not imported.

    Raises:
        InfrastructureError: There is none.
    """
    if path is not None:
        return _existing("--synsets", path)
    return in_timm() or SYNSETS.find(command)


def in_timm() -> Path | None:
    """The list inside the package timm, where its content is DataComp's."""
    package = importlib.util.find_spec("timm")
    for folder in (package.submodule_search_locations or []) if package else []:
        file = Path(folder) / "data" / "_info" / "imagenet21k_goog_synsets.txt"
        if file.is_file() and sha256_of(file) == SYNSETS.sha256:
            return file
    return None


class WordNet:
    """Where WordNet 3.0 is: a folder with the files of its ``dict``."""

    def __init__(self, package: Asset = _WORDNET_PACKAGE) -> None:
        self._package = package

    @property
    def _unpacked(self) -> Path:
        return self._package.path.with_suffix("")

    def find(self, path: Path | None, command: str) -> str:
        """Returns ``path``, or the folder of nltk's data, of Debian's package, or the fetched one.

        Raises:
            InfrastructureError: There is none.
        """
        if path is not None:
            return str(_existing("--wordnet", path))
        for place in (_in_nltk_data(), _DEBIAN_WORDNET, str(self._unpacked)):
            if place and os.path.isfile(os.path.join(place, "data.noun")):
                return place
        raise InfrastructureError(
            f"--wordnet: WordNet 3.0 is not on this machine; `{command}` fetches it, `apt-get install wordnet-base` or "
            "`python -m nltk.downloader wordnet` with `unzip` installs it, or name its folder"
        )

    def fetch(self, *, dry_run: bool) -> None:
        self._package.fetch(dry_run=dry_run)
        if not dry_run and not self._unpacked.is_dir():
            unpack_wordnet(self._package.path, self._unpacked)


def _in_nltk_data() -> str:
    try:
        import nltk

        return str(nltk.data.find("corpora/wordnet"))
    except (ImportError, LookupError):
        return ""


def unpack_wordnet(package: Path, folder: Path) -> None:
    """Writes the files of WordNet that a Debian package holds into a new folder, which is complete or absent.

    Args:
        package: The ``.deb``: an ``ar`` archive, one of whose members is a tar (deb(5)).
        folder: The folder to make.

    Raises:
        InfrastructureError: It is no such package, or a file of WordNet is not in it.
    """
    try:
        with (
            storage_errors(folder),
            tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch,
        ):
            target = Path(scratch) / "wordnet"
            target.mkdir()
            with open(package, "rb") as file:
                _seek_data(file)
                _unpack(file, target)
            lacking = [name for name in WORDNET_FILES if not (target / name).is_file()]
            if lacking:
                raise ValueError(f"it has no {lacking[0]}")
            target.rename(folder)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InfrastructureError(f"{package}: not Debian's wordnet-base: {error}") from None


def _seek_data(file: IO[bytes]) -> None:
    """Seek to the content of the member ``data.tar.…`` of an ar archive."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("no ar archive")
    while len(header := file.read(60)) == 60:
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no member data.tar")


def _unpack(file: IO[bytes], target: Path) -> None:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in WORDNET_FILES and member.isreg() and member.size <= _MAX_WORDNET_FILE:
                content = archive.extractfile(member)
                (target / name).write_bytes(content.read() if content else b"")


def _existing(flag: str, path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such file or folder")
    return path


def fetching(*flags: str) -> str:
    """The command that fetches what ``select`` with these flags needs."""
    return " ".join([PROGRAM, "models", "fetch", "select", *flags])


def import_nltk() -> None:
    """Raise InfrastructureError with the command that installs nltk, if it cannot be imported."""
    if importlib.util.find_spec("nltk") is None:
        raise InfrastructureError(f"--baseline text_based needs the package nltk: {install('nltk')}")
