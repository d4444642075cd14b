"""A newcomer's first hour: every command of the README runs, in its order, in a fresh copy with an empty home.

One bash types them all, as a user in one terminal does.  What needs weights runs with ``--embedded``, with
``--dry_run`` or on tiny models that a local server gives out under the names of the real ones; a submitted job runs
at once; ``ollama create`` only looks at its file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import EXAMPLES, ROOT
from tests.download.img2dataset import copy_of
from tests.publish.servers import serve_s3
from tests.servers import photo_server
from tests.servers.hub import Model, serve
from tests.servers.odd_server import Answer, Asked, odd_server

README = ROOT / "README.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```", flags=re.M | re.S)
JOB = re.compile(r"^\|.*\| `([^`]+)` \|$", flags=re.M)
CAPTIONER, CLIP = "florence-community/Florence-2-large", "openai/clip-vit-base-patch32"
JUDGE = "Qwen/Qwen2.5-VL-32B-Instruct"
DIFFUSION = "black-forest-labs/FLUX.1-schnell"
DETECTOR = ".insightface/models/buffalo_l/det_10g.onnx"  # comes from a web server that is out of reach

# The commands of the README as functions of the shell, which call the real ones.
PRELUDE = r"""
set -eE -o pipefail
trap 'echo "STOPPED AT: $BASH_COMMAND" >&2' ERR
SMALL_03='--embedded --height 64 --width 64 --steps 1 --batch_size 4'
FLAGS_01=--embedded FLAGS_02=--embedded FLAGS_03=$SMALL_03
export FLAGS_01 FLAGS_02 FLAGS_03
make() {
    case $1 in
    demo) command make --no-print-directory -o .venv/.installed demo ;;
    test) command make --dry-run test >/dev/null ;;
    esac
}
python3() {
    case "$*" in
    *--list_models*) command python3 "$@" ;;
    0[12]_*) command python3 "${@/11434/11434}" --embedded ;;
    03_*) command python3 "$@" $SMALL_03 ;;
    *) command python3 "$@" ;;
    esac
}
curation() {
    case $1 in
    run) command curation "$@" --dry_run ;;
    plan) FLAGS_01=--embedded command curation "$@" ;;
    audit) command curation "$@" --hybrid "$ROOT/hybrid" ;; # the README's two ways to it lie in one folder here
    download) command curation "$@" --allow_private 127.0.0.0/8 ;;
    generate) command curation "$@" $SMALL_03 --rerun ;; # the stand-in has begun the folder without checks
    caption) command curation "$@" --device cpu --max_tokens 64 --max_error_rate 0.9 ;;
    extract) command curation "${@/http:\/\/localhost:8000/$JUDGE_URL}" ;;
    *) command curation "$@" ;;
    esac
}
ollama() { [ "$1 $2 $3" = 'create tulu3:fairclip -f' ] && grep -q '^FROM ' "$4"; }
sbatch() {
    local script flags
    while [ "${1#--}" != "$1" ]; do shift; done
    script=$1 flags=FLAGS_${1:0:2}
    shift
    SLURM_JOB_ID='' bash "$script" "$@" ${!flags:-}
}
./run_pipeline.sh() { command bash run_pipeline.sh --here "$@"; }
"""


def commands() -> str:
    """The README's blocks, and behind them the commands of its table of jobs."""
    text = README.read_text("utf-8")
    blocks, jobs = BLOCK.findall(text), JOB.findall(text)
    assert len(blocks) >= 4
    assert len(jobs) >= 8
    lines = [line for job in jobs for line in job.split(" && ")]  # of `a && b` the shell would forgive that a fails
    return "\n".join([*blocks, "cd .", *lines])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a clone holds, with the environment that this test runs in."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "clone" / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path / "clone"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server with tiny models under the names of the README's, and a table of URLs of photos."""
    from tests.backends.tiny_captioners import save
    from tests.backends.tiny_extractors import save_clip
    from tests.backends.tiny_pipelines import save_tiny_flux

    save("florence2", tmp_path / "captioner", ends_after=2)
    save_clip(tmp_path / "clip")
    save_tiny_flux(tmp_path / "flux")
    folders = {CAPTIONER: "captioner", CLIP: "clip", DIFFUSION: "flux"}
    models = {name: Model(tmp_path / folder) for name, folder in folders.items()}
    (tmp_path / "tables").mkdir()
    with photo_server(EXAMPLES) as port, serve(models) as server:
        rows = ["url\tcaption", *(f"http://127.0.0.1:{port}/photo/{n}\tphoto {n}" for n in range(4))]
        copy_of(tmp_path / "img2dataset", port)
        (tmp_path / "tables" / "urls.tsv").write_text("\n".join(rows) + "\n", "utf-8")
        yield server.url


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """A server of S3, named by the environment, with the README's bucket."""
    with serve_s3("moto", tmp_path) as server:
        server.client.create_bucket(Bucket="bucket")
        yield "bucket"


@pytest.fixture
def judge() -> Iterator[str]:
    """A server with the README's judging model, whose scores are all 3."""

    def scores(asked: Asked) -> Answer:
        return Answer(json.dumps(dict.fromkeys(asked.body["response_format"]["json_schema"]["schema"]["required"], 3)))

    with odd_server(scores) as server:
        models = Answer(json.dumps({"data": [{"id": JUDGE}]}))
        server.other = lambda asked: models if asked.path == "/v1/models" else None
        yield server.url


def funnel(printed: str) -> dict[str, int]:
    """What the last ``make demo`` told of the samples."""
    names = ("in", "with a face", "English", "rewritten", "generated", "replaced")
    found = {name: re.findall(rf"^  {name} +(\d+)", printed, flags=re.M) for name in names}
    assert all(len(values) == 2 for values in found.values()), printed  # the same both times
    assert all(len(set(values)) == 1 for values in found.values()), printed
    return {name: int(values[0]) for name, values in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(project: Path, hub: str, bucket: str, judge: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "DataCompDR" / "14").mkdir(parents=True)
    shutil.copy(EXAMPLES / "00000000.tar", tmp_path / "DataCompDR" / "14" / "00000744.tar")
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "captions.jsonl").write_text('{"key": "none", "vlm_caption": "a red bicycle"}\n', "utf-8")
    (tmp_path / "home" / DETECTOR).parent.mkdir(parents=True)
    (tmp_path / "home" / DETECTOR).touch()
    shards = ("00000000.tar", "00000001.tar")
    for name in shards:
        shutil.copy(EXAMPLES / name, tmp_path / "shards" / name)
    script = PRELUDE + commands().replace("/path/to/", f"{tmp_path}/") + "\nmake demo\n"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SLURM", "SBATCH"))}
    environment = {
        **kept, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(project), "HF_ENDPOINT": hub,
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "2", "JUDGE_URL": judge,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=880
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    root = tmp_path / "root"
    assert {path.name for path in (root / "hybrid").glob("*.tar")} == set(shards)
    assert (root / "report.html").is_file()
    assert len(list((root / "recaptions" / "rows").glob("*.jsonl"))) == 2
    assert (root / "near.parquet").is_file()
    assert len(list((root / "judged").glob("*.parquet"))) == 2
    assert (root / "folders" / "rows" / "14" / "00000744.jsonl").is_file()
    assert "2 shards published" in done.stdout
    assert len(list((root / "subset").glob("*.tar"))) == 1
    assert len(list((root / "downloads").glob("*.tar"))) == 1

    counts = funnel(done.stdout)
    assert counts["in"] == len((ROOT / "examples" / "truth.tsv").read_text("utf-8").splitlines()) - 1
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts["generated"] == counts["replaced"] > 0
    assert "small stand-in model" in done.stdout
    assert "noise" in done.stdout
    page = (project / "demo-output" / "report.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") > 2 * counts["generated"]
    assert {path.name for path in (project / "demo-output" / "shards").glob("*.tar")} == {
        s.name for s in EXAMPLES.glob("*.tar")
    }
