"""Reads tables of numbers that ``torch.save`` wrote, without running anything that such a file asks for.

torch reads with ``weights_only``.  But DataComp's centroids are a NumPy array in pickle's protocol 4, which torch does
not read that way: of such a file the names, numbers and bytes are listed, and nothing is run at all.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.errors import InfrastructureError, UsageError, install

_KEY = "image_features"  # of DataComp's files of ImageNet's features
_TYPES = frozenset({"f2", "f4", "f8"})
_MAX_PICKLE_BYTES = 16 << 30
_ROWS = 1024
_OF_MEMORY = frozenset({"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"})
_FIXED = [0, 1, 0, 1, 3, -1, -1, 0]  # the numbers of an array's pickle beside its shape and its order

Rows = NDArray[np.float32]


def saved_blocks(path: Path, flag: str) -> Iterator[Rows]:
    """Yields the rows of a two-dimensional array or tensor as float32, some at a time.

    Args:
        path: A file of ``torch.save``: an array, a tensor, or a dict with a tensor as ``image_features``.
        flag: The option that names it, for messages.

    Raises:
        UsageError: It is something else.
        InfrastructureError: It holds tensors, and torch is not installed.
    """
    array = _array(path, flag)
    if array is None:
        yield from _of_tensor(path, flag)
        return
    for start in range(0, len(array), _ROWS):
        yield np.ascontiguousarray(array[start : start + _ROWS], np.float32)


def _of_tensor(path: Path, flag: str) -> Iterator[Rows]:
    try:
        import torch
    except ImportError:
        raise InfrastructureError(f"{flag} {path}: this file needs the package torch: {install('torch')}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols of pickle
            with torch.serialization.safe_globals(_of_arrays()):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes of it
        reason = str(error).strip().split("\n", 1)[0][:100]
        raise UsageError(
            f"{flag} {path}: not a table of numbers that torch.save wrote ({reason}); a .npy of numpy.save is taken too"
        ) from error
    found = torch.from_numpy(found) if isinstance(found, np.ndarray) and found.dtype.str[1:] in _TYPES else found
    found = found.get(_KEY) if isinstance(found, dict) else found
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim != 2:
        raise UsageError(f"{flag} {path}: no table of numbers, one row each, nor a dict with one as {_KEY!r}")
    for start in range(0, len(found), _ROWS):
        yield found[start : start + _ROWS].float().numpy()


def _of_arrays() -> list[Any]:
    """What an array of numbers is made of in torch's own protocol, 2; NumPy called its module otherwise before 2.0."""
    rebuild: Any = np.empty(0).__reduce__()[0]
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*names, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in sorted(_TYPES))]


def _array(path: Path, flag: str) -> NDArray[Any] | None:
    """The file's array; None where the file holds something else than an array in protocol 3 or 4."""
    try:
        with zipfile.ZipFile(path) as archive:
            [member] = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
            if member.file_size > _MAX_PICKLE_BYTES:
                raise UsageError(f"{flag} {path}: larger than {_MAX_PICKLE_BYTES:,} bytes")
            return _listed_array(archive.read(member))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError):  # torch then says what is wrong with the file
        return None


def _listed_array(pickled: bytes) -> NDArray[Any] | None:
    """The table of floating-point numbers that a pickle describes; None where it describes something else.

    An array is always described by the same names, numbers and bytes in the same order: here they are listed and
    compared.

    Raises:
        ValueError: It is no pickle, or the bytes are not as many as the shape says.
    """
    names: list[str] = []
    numbers: list[int] = []
    contents: list[bytes] = []
    for operation, value, _ in pickletools.genops(pickled):
        if operation.name in _OF_MEMORY:
            continue
        if isinstance(value, str):
            names += [word for word in value.split(" ") if not word.startswith("numpy")]
        elif isinstance(value, bytes):
            contents.append(value)
        elif isinstance(value, int):
            numbers.append(value)
        elif operation.name in ("NEWTRUE", "NEWFALSE"):
            numbers.append(operation.name == "NEWTRUE")
    if names[:3] != ["_reconstruct", "ndarray", "dtype"] or len(names) != 5 or len(numbers) != 11 or len(contents) != 2:
        return None
    kind, order = names[3:]
    rows, width, by_column = numbers[2], numbers[3], numbers[-1]
    if kind not in _TYPES or order not in "<>=" or [*numbers[:2], *numbers[4:-1]] != _FIXED or width < 1:
        return None
    array: NDArray[Any] = np.frombuffer(contents[1], np.dtype(f"{order}{kind}"))
    return array.reshape((rows, width), order="F" if by_column else "C")
