#!/usr/bin/env python3
"""Every benchmark one after the other, each beside its peers and its limit in one run: ``make bench``.

Each file bench_*.py, recaption.py, metadata.py and gpu.py prints its own table and ends with 0 where its aim was met
and 1 where it was not; this one shows them as they come, and a summary at the end.  ``--write`` keeps the whole in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
VERDICTS = {0: "met", 1: "**missed**"}


def first_sentence(script: Path) -> str:
    """What the benchmark says of itself, up to the first full stop."""
    docstring = script.read_text("utf-8").split('"""', 2)[1]
    return " ".join(docstring.split(".", 1)[0].split())


def run(script: Path) -> tuple[int, str, float]:
    """Exit code, what it printed (shown meanwhile), seconds."""
    began = time.monotonic()
    command = [sys.executable, str(script)]
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    return process.returncode, "".join(printed).strip(), time.monotonic() - began


def machine() -> str:
    """The machine in words that say what the figures depend on, and nothing that names it."""
    models = {
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        if line.startswith("model name")
    }
    cores = len(os.sched_getaffinity(0))
    return f"{', '.join(sorted(models)) or platform.machine()}, {cores} cores, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of them: reshard, faces, …")
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks.md")
    options = parser.parse_args()
    found = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    found |= {name: FOLDER / f"{name}.py" for name in ("recaption", "metadata", "gpu")}
    if unknown := set(options.only or []) - set(found):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    chosen = {name: found[name] for name in options.only} if options.only else found
    sections, summary, codes = [], ["| benchmark | aim | seconds |", "|---|---|---|"], set()
    for name, script in chosen.items():
        print(f"\n== {name}: {first_sentence(script)}", flush=True)
        code, printed, seconds = run(script)
        codes.add(code)
        summary.append(f"| {name} | {VERDICTS.get(code, f'did not end well ({code})')} | {seconds:.0f} |")
        command = f"python {script.relative_to(ROOT)}"
        sections.append(f"## {name}\n\n{first_sentence(script)}.\n\n```bash\n{command}\n```\n\n{printed}\n")
    table = "\n".join(summary)
    print(f"\n{machine()}\n\n{table}")
    if options.write:
        about = (
            "The last run of `make bench`, written by `python benchmarks/run_all.py --write`. `make test` runs each "
            f"benchmark at a tiny\nsize (`--tiny`), which only shows that it still works.\n\n{machine()}"
        )
        PAGE.write_text(f"# Benchmarks\n\n{about}\n\n{table}\n\n" + "\n".join(sections), "utf-8")
    return max(codes) if codes <= {0, 1} else 2


if __name__ == "__main__":
    sys.exit(main())
