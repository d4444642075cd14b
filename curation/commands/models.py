"""``curation models fetch``: every weight that stages' options name, on a machine that has internet.

Compute nodes have none: what is fetched here lies in the caches that the stages read, and they then need no network.
The stage itself says what it needs (``Stage.weights``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation import PROGRAM
from curation.commands.pipeline.check import commands
from curation.commands.pipeline.command import Options as PipelineOptions
from curation.commands.pipeline.command import gathered
from curation.commands.pipeline.file import choose, is_pipeline, read_pipeline
from curation.commands.stages import find_script, load_script, partial_options, stage_class
from curation.commands.tables.baselines import BaselineOptions, weights
from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError, UsageError
from curation.models.needs import WeightsNeed
from curation.options import RunOptions, exit_code, parse_arguments, say_error
from curation.run import Stage

USAGE = f"""usage: {PROGRAM} models fetch [--dry_run]
       {PROGRAM} models fetch STAGE [--dry_run] [the stage's own flags]
       {PROGRAM} models fetch PIPELINE.yaml [--dry_run] [--stages 01-03] [03.model=NAME]
       {PROGRAM} models fetch CONFIG.yml [--dry_run]
       {PROGRAM} models fetch select --baseline NAME [--centroids SCALE] [--dry_run]

Fetches the weights that stages need, for nodes without internet.

without STAGE  what stages 01 to 04 need with their default options
STAGE          01 to 06, the script's whole name, or the stage's command (faces, rewrite, generate, reshard, caption,
               extract).  Flags that name no model, such as those for folders, may be left out.
PIPELINE.yaml  a file for `{PROGRAM} run`: what its stages need.  Variables for folders need no value
CONFIG.yml     a configuration of stage 06
select         what a baseline of `{PROGRAM} select` needs: DataComp's language model, WordNet 3.0 and the list of
               ImageNet-21k's synsets, or DataComp's centroids and ImageNet's features
--dry_run      only say what would be fetched, with sizes where they are known, and what is there already"""

MAIN_STAGES = ("01", "02", "03", "04")


@dataclass(frozen=True, slots=True)
class Request:
    """A stage whose weights are asked for.

    Attributes:
        title: What messages call it.
        kind: The stage.
        options: Its options, not checked yet.
    """

    title: str
    kind: type[Stage[Any]]
    options: RunOptions


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]) or arguments[1:] in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_OK
    if not arguments or arguments[0] != "fetch":
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    if arguments[1:2] == ["select"]:
        return _fetch_for_select(arguments[2:])
    requests, dry_run = _requests(arguments[1:])
    troubles = [trouble for request in requests for trouble in _fetch(request, dry_run, alone=len(requests) == 1)]
    for trouble in troubles:
        say_error(trouble)
    if troubles:
        return EXIT_USAGE
    if len(requests) > 1:
        print("\nNothing was fetched: --dry_run." if dry_run else "\nAll the files are now on this machine.")
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class SelectOptions(BaselineOptions):
    """Fetch what a baseline of `curation select` needs."""

    dry_run: bool = False
    """Only say what would be fetched, and what is there already."""


def _fetch_for_select(words: Sequence[str]) -> int:
    options = parse_arguments(SelectOptions, words, "models fetch select")
    for need in weights(options):
        need.fetch(dry_run=options.dry_run)
    return EXIT_OK


def _requests(words: Sequence[str]) -> tuple[list[Request], bool]:
    """The stages that are meant, and whether nothing is to be fetched.  words: what follows ``fetch``."""
    if not words or words[0].startswith("-"):
        if set(words) - {"--dry_run", "--dry-run"}:
            raise UsageError(
                f"{words[0]}: an option of which stage?  Name the stage first, as in "
                f"`{PROGRAM} models fetch 03 {' '.join(words)}`"
            )
        return [_request(stage, []) for stage in MAIN_STAGES], bool(words)
    stage, *flags = words
    if stage.endswith((".yml", ".yaml")):
        if is_pipeline(Path(stage)):
            return _of_pipeline(words)
        stage, flags = "06", ["--yml", stage, *flags]
    request = _request(stage, flags)
    return [request], request.options.dry_run


def _of_pipeline(words: Sequence[str]) -> tuple[list[Request], bool]:
    options = parse_arguments(PipelineOptions, gathered(words), "models fetch")
    pipeline = read_pipeline(options.file, options.set, strict=False)
    found = commands(pipeline, choose(pipeline, options.stages), options.shared(), only_weights=True)
    return [Request(command.title, command.kind, command.options) for command in found], options.dry_run


def _request(stage: str, flags: Sequence[str]) -> Request:
    script = find_script(stage)
    module = load_script(script)
    options = partial_options(module, flags, f"{PROGRAM} models fetch {script.stem}")
    return Request(script.stem, stage_class(module), options)


def _fetch(request: Request, dry_run: bool, *, alone: bool) -> list[str]:
    """Fetch what a stage needs; returns what kept it from being fetched.  The rest is fetched anyway."""
    if not alone:
        print(f"\n{request.title}", flush=True)
    needs: Sequence[WeightsNeed] = ()
    try:
        needs = request.kind.weights(request.options)
        if not needs:
            print("this stage needs no model: nothing to fetch")
            return []
        request.options.check()
    except InfrastructureError as error:
        if alone:
            raise
        return [f"{request.title}: {error}"]
    troubles = []
    for need in needs:
        try:
            need.fetch(dry_run=dry_run)
        except InfrastructureError as error:
            if not alone:
                print("cannot be fetched: the error at the end says why")
            troubles.append(str(error) if alone else f"{request.title}: {error}")
    return troubles
