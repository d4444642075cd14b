"""``curation models fetch``: every weight that a stage's options name, on a machine that has internet.

Compute nodes have none: what is fetched here lies in the caches that the stages read, and they then need no network.
The stage itself says what it needs (``Stage.weights``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from curation import PROGRAM
from curation.commands.stages import find_script, load_script, partial_options, stage_class
from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError
from curation.options import exit_code

USAGE = f"""usage: {PROGRAM} models fetch STAGE [--dry_run] [the stage's own flags]
       {PROGRAM} models fetch CONFIG.yml [--dry_run]

Fetches the weights that the stage's options name, for nodes without internet.  STAGE: 01 to 06, or the script's
whole name.  Flags that name no model may be left out.  CONFIG.yml: stage 06's.  --dry_run: only say what would be
fetched, with sizes where they are known."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]) or arguments[1:] in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_OK
    if len(arguments) < 2 or arguments[0] != "fetch":
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    stage, flags = arguments[1], arguments[2:]
    if stage.endswith((".yml", ".yaml")):
        stage, flags = "06", ["--yml", stage, *flags]
    script = find_script(stage)
    module = load_script(script)
    options = partial_options(module, flags, f"{PROGRAM} models fetch {script.stem}")
    needs = stage_class(module).weights(options)
    if not needs:
        print("this stage needs no model: nothing to fetch")
        return EXIT_OK
    options.check()
    troubles = []
    for need in needs:
        try:
            need.fetch(dry_run=options.dry_run)
        except InfrastructureError as error:  # the others can be fetched all the same
            troubles.append(str(error))
    if troubles:
        raise InfrastructureError("; ".join(troubles))
    return EXIT_OK
