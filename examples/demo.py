#!/usr/bin/env python3
"""The whole pipeline on the example shards, on a CPU, with models that packages ship: ``make demo``.

Runs stages 01 → 02 → 03 → 04 into ``demo-output/`` and then tells, from the receipts, what happened to the samples.
Last it writes ``demo-output/report.html``, the page to look at.
Started again it finds everything done and only tells; ``make clean`` or another folder as its argument starts afresh.
"""

import os
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


def run_stages(output: str) -> None:
    """Run each stage with its stand-in model; a stage that does not end well ends the demo with its exit code."""
    threads = str(len(os.sched_getaffinity(0)))
    for command in stage_commands(SOURCE, output):
        extra = ["--verify"] if command[0].startswith("04") else ["--embedded"]
        print(f"\n$ python {' '.join(command + extra)}", flush=True)
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "HF_HUB_OFFLINE": "1"}
        code = subprocess.run([sys.executable, *command, *extra], cwd=ROOT, env=environment, check=False).returncode
        if code:
            sys.exit(code)


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
    print(f"\n$ python {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


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
    print(f"\nThe page to look at is {output}/report.html.")
    print(f"The hybrid shards are in {output}/shards/ ({time.monotonic() - began:.0f} s). Mind that")
    print("  - the prompts come from a small stand-in model (Gemma 3 270M): fit for a demo, not for research;")
    print("  - the pictures are noise: the image model's weights are random.")
    print("\nThe same run with full-size models (language model servers on ports 11434 to 11437, and a GPU):")
    for command in stage_commands(SOURCE, "hybrid"):
        print(f"  python {' '.join(command)}")


if __name__ == "__main__":
    main()
