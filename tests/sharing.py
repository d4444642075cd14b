"""Which tests share a process of pytest-xdist: those of a file, and those of files that share a costly fixture.

pytest-xdist's own groups do nothing with this pytest (its marks end in names that pytest no longer takes over), so
that the scheduler is told by the tests' names.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

SHARED = {  # file → what its tests share with those of others
    "tests/slurm/": "one cluster",
}


class Scheduling(LoadScopeScheduling):
    """The next process that is free takes the next group."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return next((shared for place, shared in SHARED.items() if file.startswith(place)), file)
