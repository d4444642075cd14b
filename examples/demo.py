#!/usr/bin/env python3
"""The whole pipeline on the example shards, on a CPU, with models that packages ship: ``make demo``.

Runs stages 01 → 02 → 03 → 04 into ``demo-output/`` and then tells, from the receipts, what happened to the samples.
Last it writes ``demo-output/report.html``, the page to look at.  It shows the last line of each stage; on a
terminal also the newest line of its log while it runs.  Where a stage fails, its whole log is shown.
Started again it finds everything done and only tells; ``make clean`` or another folder as its argument starts afresh.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from curation.run.ledger import done_receipts

SOURCE = "examples/shards"


def stage_commands(source: str, output: str) -> list[list[str]]:
    """The four commands as a user types them, without ``--embedded``."""
    captions, prompts, edits, shards = (f"{output}/{name}" for name in ("captions", "prompts", "edits", "shards"))
    return [
        ["01_filter_noface.py", "--input", source, "--output", captions, "--edits", edits],
        ["02_captions_processor.py", "--input", captions, "--output", prompts],
        ["03_generate_images_multigpu.py", "--input", prompts, "--output", edits],
        ["04_reshard.py", "--input", source, "--edits", edits, "--prompts", prompts, "--output", shards],
    ]


# What the stages need beside a language model server on one port; FLUX.1-schnell, the default of 03, wants a login.
FULL_SIZE = {"02": ("--ports", "11434"), "03": ("--model", "z-image-turbo")}
HEADINGS = (
    "Stage 01 finds the samples with a face",
    "Stage 02 rewrites their captions into prompts",
    "Stage 03 generates a picture for each prompt",
    "Stage 04 writes the hybrid shards: the generated samples in place of the originals, every other byte as it was",
)


def run_stages(output: str) -> None:
    """Run each stage with its stand-in model; a stage that does not end well ends the demo with its exit code."""
    threads = str(len(os.sched_getaffinity(0)))
    for heading, command in zip(HEADINGS, stage_commands(SOURCE, output), strict=True):
        extra = ["--verify"] if command[0].startswith("04") else ["--embedded"]
        print(f"\n{heading}\n$ python {' '.join(command + extra)}", flush=True)
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "HF_HUB_OFFLINE": "1"}
        run_quietly([sys.executable, *command, *extra], environment)


def run_quietly(command: list[str], environment: dict[str, str]) -> None:
    """Run a command and print the last line of its log, or the whole log where it fails.

    On a terminal, its newest line stands below meanwhile, and is replaced by the next one.
    """
    log: list[str] = []
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(re.sub(r"^\d\d:\d\d:\d\d ", "", line.rstrip()))
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[2K{log[-1][:width]}", end="", flush=True)
    if terminal:
        print("\r\x1b[2K", end="")
    print("\n".join(log if process.returncode else log[-1:]), flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def stage_counts(folder: Path, stage: str) -> tuple[Counter[str], Counter[str]]:
    """What came in and was kept, and why the rest was not, over all shards of a stage."""
    flow: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for receipt in done_receipts(folder, stage):
        counts = receipt["counts"]
        flow += Counter({"in": counts["in"], "kept": counts["kept"]})
        reasons += Counter(counts["dropped"]) + Counter(counts["failed"])
        flow += Counter({name: value for name, value in receipt["notes"].items() if isinstance(value, int)})
    return flow, reasons


def print_funnel(output: Path) -> None:
    """in → with a face → English → rewritten → generated → replaced, each from the receipts."""
    faces, no_face = stage_counts(output / "captions", "01_filter_noface")
    texts, no_text = stage_counts(output / "prompts", "02_captions_processor")
    images, no_image = stage_counts(output / "edits", "03_generate_images")
    hybrid, _ = stage_counts(output / "shards", "04_reshard")
    other_language = no_text["not_english"]
    rows = [
        ("in", faces["in"], ""),
        ("with a face", faces["kept"], _told(no_face)),
        ("English", texts["in"] - other_language, f"{other_language} not_english" if other_language else ""),
        ("rewritten", texts["kept"], _told(no_text - Counter({"not_english": other_language}))),
        ("generated", images["kept"], _told(no_image)),
        ("replaced", hybrid["edited"], f"of {hybrid['in']} samples in the hybrid shards"),
    ]
    print("\nWhat happened to the samples")
    for name, count, rest in rows:
        print(f"  {name:<12} {count:>5}   {rest}".rstrip())


def write_report(output: str) -> None:
    """One page about it all, for a browser."""
    command = ["-m", "curation", "report", output, "--source", SOURCE, "-o", f"{output}/report.html"]
    print(f"\nThe report puts it all on one page\n$ python {' '.join(command)}", flush=True)
    run_quietly([sys.executable, *command], {**os.environ})


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    output = sys.argv[1] if len(sys.argv) > 1 else "demo-output"
    began = time.monotonic()
    run_stages(output)
    print_funnel(ROOT / output)
    write_report(output)
    print(f"\nThe demo is done in {time.monotonic() - began:.0f} s. It has tested the installation.")
    print(f"  Open {output}/report.html in a browser. The hybrid shards are in {output}/shards/.")
    print("  The prompts come from a small stand-in model (Gemma 3 270M), and are not fit for research.")
    print("  The pictures are noise with the prompt written over it: the image model has random weights.")
    print("\nThe same run with full-size models needs Ollama and a GPU:")
    print("  source .venv/bin/activate")
    print("  ollama pull tulu3 && ollama create tulu3:fairclip -f examples/ollama/Modelfile")
    for command in stage_commands(SOURCE, "hybrid"):
        print(f"  python {' '.join([*command, *FULL_SIZE.get(command[0][:2], ())])}")


if __name__ == "__main__":
    main()
