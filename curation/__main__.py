"""``python -m curation <command>``: what to do with the folders of a dataset beside running its stages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from curation.errors import EXIT_OK, EXIT_USAGE

COMMANDS = {  # command → the module whose ``main(argv)`` it is, imported when it is asked for; what it does
    "status": (
        "curation.commands.status.command",
        "how far the stages below a folder are: done, failed, running, pending, stale",
    ),
    "retry": ("curation.commands.retry", "make failed shards of a stage pending again"),
    "select": ("curation.commands.tables.select", "the uids of the samples whose scores fulfil a condition"),
    "neardup": (
        "curation.commands.tables.neardup",
        "near duplicates by features: groups, and one sample of each to keep",
    ),
    "publish": ("curation.commands.publish", "upload a stage's finished outputs to a dataset repository of the hub"),
    "verify": ("curation.commands.verify.command", "prove that hybrid shards are their source with the edits in place"),
    "fsck": (
        "curation.commands.fsck.command",
        "what is wrong with tar shards, and every whole sample out of damaged ones",
    ),
    "plan": (
        "curation.commands.plan.command",
        "forecast hours, bytes, files and tokens from a few shards; the sbatch lines",
    ),
    "audit": (
        "curation.commands.audit.command",
        "what became of each group's samples, and whether one fared otherwise",
    ),
    "report": ("curation.commands.report.command", "one page about it all: funnel, shards, speed, gallery, groups"),
    "register": ("curation.serving.registry", "keep a model server in the folder of servers while it lives"),
    "models": (
        "curation.commands.models",
        "fetch: the weights that a stage's options name, for nodes without internet",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK
    if arguments[0] not in COMMANDS:
        print(f"error: there is no command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    code: int = import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    return code


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m curation COMMAND ...", "", *lines, "", "Each has its own --help."])


if __name__ == "__main__":
    sys.exit(main())
