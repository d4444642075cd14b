"""Every benchmark at its tiny size: its code runs, and the figures that it is for are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from curation.backends.generate.presets import presets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_models  # noqa: E402 - benchmarks are no package

SHARED = {"measuring", "florence2", "gpu_models", "run_all"}  # what benchmarks import, and the one that runs them all
NUMBER = r"[\d,]+(\.\d+)?"
# The command → what each of its rows begins with, and a pattern of the figures behind that.
FIGURES = {
    "accuracy_faces": {"00000003": NUMBER, r"\*\*00000003\*\*": NUMBER},
    "accuracy_language": {r"cleaned, most probable \(chosen\)": NUMBER, "00000001": NUMBER},
    "bench_checks": {"face": NUMBER, "prompt and group": NUMBER, r"sd-turbo \| compiled": NUMBER},
    "bench_claims": {"20 shards, 4 workers: done, worked on twice": "20, 0", "claims": NUMBER, "modulo": NUMBER},
    "bench_download": {rf"{mode} \| stage 00": NUMBER for mode in ("kept, not decoded", "decoded, kept")},
    "bench_endpoint": dict.fromkeys(("stage 05, --batch_size auto", "plain loop, batch by batch"), NUMBER),
    "bench_faces": {r"detector \| images/s": NUMBER, r"recorded \| MB/s": NUMBER},
    "bench_generate": {"bare pipeline in a loop": NUMBER, "stage 03": NUMBER},
    "bench_llm": {"language, captions/s": NUMBER, **{f"{scene}, requests/s": NUMBER for scene in ("even", "single")}},
    "bench_plan": {r"01_filter_noface \| 2 \| 1": NUMBER, r"02_captions_processor \| 2 \| 1": NUMBER},
    "bench_reshard": dict.fromkeys((r"cp \+ fsync", "tarfile", "webdataset", "stage 04"), NUMBER),
    "bench_runner": {r"nothing \| 20": NUMBER, r"output \+ provenance \| 40": NUMBER},
    "bench_search": {
        "index": NUMBER,
        "a query, median": NUMBER,
        "of the 20 nearest, found": NUMBER,
        "select --balance concepts": NUMBER,
        "select --balance clusters": NUMBER,
    },
    "bench_select": dict.fromkeys(("no_filter", "basic", "laion2b", "clip_l14_30", "image_based"), NUMBER),
    "bench_status": {r"status \| 2,000": NUMBER, r"discovery \| 2,000": NUMBER},
    "bench_verify": {"sha256sum": NUMBER, "verify, 1 process": NUMBER, "verify, 2 processes": NUMBER},
    "faces_at_once": {"onnxruntime, one picture": NUMBER, "torch, 4 at once": NUMBER},
    "metadata": {"bare model, preloaded tensors": NUMBER, "stage 06, exact": NUMBER, "plain loop, one process": NUMBER},
    "recaption": {"bare model, tensors prepared before": NUMBER, "stage 05": NUMBER, "plain loop": NUMBER},
    "gpu --only sd-turbo qwen clip-b32": {
        rf"{model} \| {flags}": NUMBER
        for model, flags in (
            (r"03 \| sd-turbo", "published loop"),
            (r"03 \| sd-turbo", "as it is"),
            (r"05 \| qwen2.5-vl-7b", "published loop"),
            (r"05 \| qwen2.5-vl-7b", "--batch_size 48"),
            (r"06 \| clip-b32", "published loop"),
            (r"06 \| clip-b32", "as it is"),
        )
    },
}


def test_no_benchmark_is_forgotten() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert found - SHARED == {command.split()[0] for command in FIGURES}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a machine that is busy with other things
@pytest.mark.parametrize("command", FIGURES)
def test_the_tiny_size_runs_and_prints_its_figures(command: str) -> None:
    name, *flags = command.split()
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--tiny", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for row, figures in FIGURES[command].items():
        assert re.search(rf"^\| {row}.*\| {figures}", result.stdout, flags=re.M), f"{row}\n{result.stdout}"


@pytest.mark.parametrize("name", sorted(gpu_models.PIPELINES))
def test_the_pipelines_of_the_gpu_table_have_their_real_size(name: str) -> None:
    """As many parameters as the models' published configurations give, by part: counted without memory."""
    import torch

    with gpu_models.made_on("meta", torch.bfloat16):
        pipeline = gpu_models.PIPELINES[name][0]()
    modules = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    counted = sorted(round(sum(p.numel() for p in module.parameters()) / 1e9, 3) for module in modules)
    assert counted == pytest.approx(sorted(presets()[name].parameters.values()), abs=0.002)
