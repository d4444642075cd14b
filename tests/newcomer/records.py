"""What a stage left in its output folders, without what differs between any two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Times, hosts and random tokens, and the commit of a checkout, which an installed package does not have.
DIFFERS = {
    "token",
    "run",
    "seconds",
    "host",
    "rank",
    "cpus",
    "open_s",
    "code",
    "started",
    "finished",
    "temporary",
    "mtime_ns",
}


def records_of(root: Path) -> dict[str, Any]:
    """The path of each file below a folder → its content.

    Of receipts and records of options, the content is the JSON value without the fields of ``DIFFERS``.  What sites
    said is left out: who asked and when stands between it, in a folder of the day.
    """
    return {
        str(path.relative_to(root)): _constant(json.loads(path.read_bytes()))
        if path.suffix == ".json" and "_receipts" in path.parts
        else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "_opt_out" not in path.relative_to(root).parts
    }


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _constant(inner) for name, inner in value.items() if name not in DIFFERS}
    return [_constant(inner) for inner in value] if isinstance(value, list) else value
