"""``curation <command>``, which is also ``python -m curation <command>``: the stages, and what else one does with the
folders of a dataset."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from curation import PROGRAM, __version__
from curation.errors import EXIT_OK, EXIT_USAGE
from curation.options import exit_code, say_error

# The commands that run a stage: each is the numbered script of the same stage (``commands.stages``).
STAGES = {
    "download": "stage 00: download the images of URL tables into shards",
    "faces": "stage 01: find the samples with faces, and write their captions and metadata",
    "rewrite": "stage 02: rewrite the captions into prompts for an image generator",
    "generate": "stage 03: generate an image for each prompt",
    "reshard": "stage 04: write new shards: hybrid ones with the generated images, or a subset of the samples",
    "caption": "stage 05: write a new caption for each image",
    "extract": "stage 06: compute scores, such as CLIP's, and features of each sample",
}
# When it is needed → the command → the module below ``curation`` whose ``main(argv)`` it is, imported only when the
# command is called, and what the command does.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "before a run": {
        "plan": (
            "commands.plan.command",
            "forecast hours, bytes, files and tokens, and show the sbatch lines",
        ),
        "models": ("commands.models", "fetch the weights that a stage's options name, for nodes without internet"),
        "scripts": (
            "commands.scripts",
            "copy the job scripts to a folder of yours, to submit them with sbatch",
        ),
    },
    "during a run": {
        "run": ("commands.pipeline.command", "run the stages of a pipeline's file, one after the other"),
        "register": ("serving.registry", "register a model server in a folder of servers as long as it runs"),
        "status": ("commands.status.command", "progress of each stage: done, failed, running, pending, stale"),
        "retry": ("commands.retry", "make failed shards of a stage pending again"),
    },
    "look at the result": {
        "report": ("commands.report.command", "write an HTML report: funnel, shards, speed, gallery, groups"),
        "audit": ("commands.audit.command", "losses of each group, and which group lost more than the others"),
        "measure": ("commands.measure", "how often the checks of stage 03 are wrong, on pictures with labels"),
    },
    "check the result": {
        "verify": (
            "commands.verify.command",
            "verify hybrid shards by their source, or what lies in a bucket",
        ),
        "fsck": (
            "commands.fsck.command",
            "find faults in tars, and save the undamaged samples",
        ),
    },
    "use the result": {
        "select": ("commands.tables.select", "list the uids of samples by their scores, or balance them"),
        "agreement": ("commands.tables.agreement", "say how far two judges of stage 06 agree, with intervals"),
        "neardup": ("commands.tables.neardup", "find groups of near duplicates by features, and keep one of each"),
        "centroids": ("commands.tables.centroids", "make the clusters of image features that select's baselines take"),
        "index": ("commands.search.index", "make a search index of a feature of stage 06"),
        "search": ("commands.search.command", "find the samples that are nearest to a text, a picture or a sample"),
        "publish": ("commands.publish", "upload a stage's finished outputs to a bucket, another filesystem or the hub"),
    },
}
COMMANDS = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}
COMMANDS |= dict.fromkeys(STAGES, "commands.stages")
_ALSO = {"help": ("-h", "--help", "help"), "version": ("-V", "--version", "version")}


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: The command's name and its arguments; ``sys.argv`` where it is None.

    Returns:
        The exit code.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in _ALSO["version"]:
        print(f"curation {__version__}")
        return EXIT_OK
    if name in _ALSO["help"]:
        if not rest:
            print(usage())
            return EXIT_OK
        name, rest = rest[0], ["--help"]
    if name.startswith("-") and rest and rest[0] in COMMANDS:
        say_error(f"{name!r} stands in front of the command; type {PROGRAM} {' '.join([rest[0], name, *rest[1:]])}")
        return EXIT_USAGE
    if name not in COMMANDS:
        say_error(f"there is no command {name!r}.{_instead_of(name)} `{PROGRAM} --help` lists all commands")
        return EXIT_USAGE
    module = import_module(f"curation.{COMMANDS[name]}")
    code: int = module.run_as_command(name, rest) if name in STAGES else module.main(rest)
    return code


def _instead_of(name: str) -> str:
    """``" Did you mean …?"`` with the commands that the user may have meant; empty where none is near."""
    scripts = import_module("curation.commands.stages").commands_of_scripts()
    word = name.lower().removeprefix("--").removesuffix(".py").removesuffix(".sh").replace("-", "_")
    meant = [command for script, command in scripts.items() if word in (script, script[:2], script[1:2])]
    if not meant:
        words = {part: command for script, command in scripts.items() for part in (script, *script.split("_")[1:])}
        words |= {command: command for command in COMMANDS}
        near = [] if word in words else _that_do(word)
        near += difflib.get_close_matches(word, words, 3, 0.6) if not near else []
        near += [command for command in COMMANDS if len(word) > 2 and command.startswith(word)]
        meant = list(dict.fromkeys(words[one] for one in near))
    return f" Did you mean {' or '.join(meant[:3])}?" if meant else ""


def _that_do(word: str) -> list[str]:
    """The commands in whose descriptions the word is: ``scores`` stands in that of ``extract``."""
    every = STAGES | {name: what for group in GROUPS.values() for name, (_, what) in group.items()}
    return [name for name, what in every.items() if len(word) > 3 and word in re.findall(r"\w+", what.lower())]


def usage() -> str:
    """Returns the text of ``curation --help``."""
    width = max(map(len, COMMANDS))
    groups = {"stages": STAGES}
    groups |= {group: {name: what for name, (_, what) in commands.items()} for group, commands in GROUPS.items()}
    lines = [f"usage: {PROGRAM} COMMAND ..."]
    for group, commands in groups.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {what}" for name, what in commands.items())]
    return "\n".join([*lines, "", f"Each command has its own --help: {PROGRAM} faces --help."])


if __name__ == "__main__":
    sys.exit(main())
