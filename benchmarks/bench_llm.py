#!/usr/bin/env python3
"""Stage 02 beside its limits and a plain loop, in one run: language identification, and requests to model servers.

language: captions a second of the stage's identification beside fastText's own batch prediction on the same captions,
    rounds alternating.  Aim: at least 0.8 of it.
even: four stub servers of four slots that answer in a fixed 50 ms, 20 threads, 2,000 captions, through the stage itself
    from the first shard's start to the last one's commit.  Aim: at least 0.97 of the slots' 320 requests a second.
uneven: one of the four four times slower, one that dies half-way.  Aim: at least 0.9 of what the slots can give.
single: one server with one slot and one with sixteen, which nobody told the stage.  No aim.

The plain loop beside them gives each of 20 threads the next caption and the next port, with a new connection each time
and no second try, as the published pipeline does.  The median of the rounds counts.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, StageReceipts, exit_code, make_parser, parse, print_table, run_stage

from curation.language import LanguageIdentifier, find_model
from tests.servers import ollama_stub

THREADS, LATENCY_S, SLOTS = 20, 0.05, 4
LANGUAGE_AIM, EVEN_AIM, UNEVEN_AIM = 0.8, 0.97, 0.9
STAGE = "02_captions_processor"
Server = dict[str, Any]  # the flags of a stub


@dataclass(frozen=True)
class Scene:
    """Some servers, and the seconds that their slots need for all captions at the very least."""

    name: str
    servers: Sequence[Server]
    least_s: float
    aim: float | None


def scenes(captions: int) -> list[Scene]:
    sound: Server = {"slots": SLOTS, "latency_s": LATENCY_S}
    rate = SLOTS / LATENCY_S  # of a sound server
    share = captions * rate / (3.25 * rate)  # of one that never dies, beside two sound ones and a slow one
    dies_after = round(share / 2)
    slow, dying = {**sound, "latency_s": 4 * LATENCY_S}, {**sound, "die_after": dies_after + 1}
    return [
        Scene("even", [sound] * 4, captions / (4 * rate), EVEN_AIM),
        Scene("uneven", [sound, sound, slow, dying], (captions - dies_after) / (2.25 * rate), UNEVEN_AIM),
        Scene("single", [{**sound, "slots": 1}, {**sound, "slots": 16}], captions / (17 / LATENCY_S), None),
    ]


def english_captions(count: int) -> list[str]:
    """As many as are asked about, made from the examples' English captions by numbering them."""
    lines = (ROOT / "examples" / "truth.tsv").read_text("utf-8").splitlines()[1:]
    found = [row[5] for row in (line.split("\t") for line in lines) if row[4] == "en"]
    return [f"{found[number % len(found)]}, photo number {number}" for number in range(count)]


# ---- language


def measure_language(rounds: int, repeats: int) -> tuple[float, float, float]:
    """Captions a second of the stage and of fastText, and the median of the rounds' ratios."""
    lines = (ROOT / "examples" / "truth.tsv").read_text("utf-8").splitlines()[1:]
    captions = [line.split("\t")[5] for line in lines] * repeats
    identifier = LanguageIdentifier(find_model())
    predict = identifier._model.predict  # fastText's own
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        identifier.identify(captions)
        middle = time.perf_counter()
        predict(captions)
        times.append((middle - began, time.perf_counter() - middle))
    ours, theirs = zip(*times[1:], strict=True)  # the first warms up
    count = len(captions)
    ratio = statistics.median(other / own for own, other in times[1:])
    return count / statistics.median(ours), count / statistics.median(theirs), ratio


# ---- requests


def through_the_stage(ports: Sequence[int], folder: Path, captions: Sequence[str]) -> tuple[float, int]:
    """Seconds from the first shard's start to the last one's commit, and prompts written."""
    (folder / "captions").mkdir()
    per_shard = len(captions) // 4
    for shard in range(4):
        part = {f"{n:06d}.json": captions[n] for n in range(shard * per_shard, (shard + 1) * per_shard)}
        (folder / "captions" / f"{shard:08d}.json").write_text(json.dumps(part), "utf-8")
    folders = ["--input", f"{folder}/captions", "--output", f"{folder}/prompts"]
    addresses = ["--host", "127.0.0.1", "--ports", ",".join(map(str, ports))]
    run_stage(STAGE, *folders, *addresses, "--num_threads", THREADS)
    receipts = StageReceipts.read(folder / "prompts", STAGE)
    return receipts.seconds, receipts.count("kept")


def in_a_plain_loop(ports: Sequence[int], folder: Path, captions: Sequence[str]) -> tuple[float, int]:
    import requests

    def ask(number: int) -> bool:
        message = {"role": "user", "content": f'sentence: "{captions[number]}" group:"asian female"'}
        body = {"model": "tulu3:fairclip", "stream": False, "messages": [message]}
        try:
            url = f"http://127.0.0.1:{ports[number % len(ports)]}/api/chat"
            return requests.post(url, json=body, timeout=10).status_code == 200
        except requests.RequestException:
            return False

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        answered = sum(threads.map(ask, range(len(captions))))
    return time.perf_counter() - began, answered


Client = Callable[[Sequence[int], Path, Sequence[str]], tuple[float, int]]


def measure(scene: Scene, client: Client, rounds: int, captions: Sequence[str]) -> tuple[float, int]:
    """The median of the rounds' seconds, and the fewest captions that were answered."""
    results = []
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            ports = [stack.enter_context(ollama_stub(**server)) for server in scene.servers]
            results.append(client(ports, Path(stack.enter_context(tempfile.TemporaryDirectory())), captions))
    return statistics.median(seconds for seconds, _ in results), min(answered for _, answered in results)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--captions", type=int, default=2000, help="of each scene with servers")
    parser.add_argument("--repeats", type=int, default=200, help="of the example captions, for the language")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print figures, not a table")
    options = parse(parser, captions=40, repeats=2, rounds=1)
    met, count, figures = True, options.captions, {}

    ours, theirs, ratio = measure_language(options.rounds + 2, options.repeats)
    met &= ratio >= LANGUAGE_AIM
    figures["language"] = {"captions_s": ours, "fasttext_captions_s": theirs, "ratio": ratio, "aim": LANGUAGE_AIM}
    rows: list[tuple[object, ...]] = [
        (
            "language, captions/s",
            f"{ours:,.0f}",
            f"{theirs:,.0f} fastText in batches",
            f"{ratio:.2f}",
            LANGUAGE_AIM,
            "",
        )
    ]
    captions = english_captions(count)
    for scene in scenes(count):
        seconds, answered = measure(scene, through_the_stage, options.rounds, captions)
        plain_s, plain_answered = measure(scene, in_a_plain_loop, 1, captions)
        limit, share = count / scene.least_s, scene.least_s / seconds
        met &= answered == count and share >= (scene.aim or 0)
        figures[scene.name] = {"requests_s": count / seconds, "limit": limit, "ratio": share, "aim": scene.aim or 0}
        lost = f", {count - plain_answered:,} captions lost" if plain_answered < count else ""
        plain = f"{plain_answered / plain_s:.0f}{lost}"
        rate, of_slots = f"{count / seconds:.0f}", f"{limit:.0f} by the slots"
        rows.append((f"{scene.name}, requests/s", rate, of_slots, f"{share:.3f}", scene.aim or "", plain))
    if options.json:
        print(json.dumps(figures))
    else:
        print_table(["", "stage 02", "limit", "of the limit", "aim", "plain loop"], rows)
    return exit_code(met, options)


if __name__ == "__main__":
    sys.exit(main())
