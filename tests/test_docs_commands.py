"""Every command of the pages is one that the programs take, and those of DataComp's baselines run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import __main__ as command_line
from curation import options as options_module
from curation.commands.stages import find_script, load_script, partial_options
from curation.errors import UsageError
from curation.tar.samples import read_samples
from tests import EXAMPLES, ROOT
from tests.test_docs import PAGES, code_lines, saved_files

DOCS = ROOT / "docs"
JOBS = [*sorted((DOCS / "jobs").glob("*.md")), DOCS / "neardup.md", DOCS / "stage-00.md"]
# What a page may also tell its reader to run: programs of the system, of Ollama, of SLURM and of the hub.
OTHERS = {"source", "cd", "ollama", "sleep", "kill", "scancel", "hf", "./install.sh"}
PROGRAMS = re.compile(r"(?:^|[\s/])(?:curation|0\d_\w+\.(?:py|sh)|run_pipeline\.sh)(?:\s|$)")
ENTER = "source .venv/bin/activate"


def blocks(page: Path) -> list[list[str]]:
    """The commands of each of the page's bash blocks."""
    found = re.findall(r"^```bash\n.*?^```", page.read_text("utf-8"), flags=re.M | re.S)
    return [list(_lines(block)) for block in found]


def _lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines()[1:-1]:
        if (line := line.split("  #", 1)[0].strip()) and not line.startswith("#"):
            yield line


class Parsed(BaseException):
    """The program took its command line."""


@contextmanager
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs end once they have parsed their command line."""
    read = options_module.read_options

    def read_and_end(*arguments: Any, **named: Any) -> Any:
        read(*arguments, **named)
        raise Parsed  # before values are looked at: $ROOT has none here

    with monkeypatch.context() as patch:
        patch.setattr(options_module, "read_options", read_and_end)
        yield


def parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless each word of the line is one that its program takes."""
    words = shlex.split(line, comments=True)
    end = next((place for place, word in enumerate(words) if word in ("&", "|", ">")), len(words))
    words = words[:end]
    if words[0] == "export":
        words = words[1:]
    flags: dict[str, list[str]] = {}  # of FLAGS_03='…': the stage → its flags
    while words and (match := re.fullmatch(r"([A-Z]\w*)=(.*)", words[0], flags=re.S)):
        if match[1].startswith("FLAGS_"):
            flags[match[1][-2:]] = match[2].split()
        words.pop(0)
    for stage, given in flags.items():
        partial_options(load_script(find_script(stage)), given, line)
    if not words or words[0] in OTHERS or " ".join(words).startswith("python benchmarks/"):
        return
    program = next((n for n, word in enumerate(words) if re.search(r"(^|/)(curation|0\d_\w+\.(py|sh))$", word)), None)
    if words[0] == "./run_pipeline.sh":
        own, _, passed = " ".join(words[1:]).partition("-- ")
        assert set(own.split()) <= {"--follow", "--dry_run", "--here", "--stages", "02-04"}, line
        partial_options(load_script(find_script("04")), passed.split(), line)
    elif words[0] == "sbatch" and words[-1] == "serve_endpoints.sh":
        return
    else:
        assert program is not None, f"what is this? {line}"
        name, arguments = Path(words[program]).name, words[program + 1 :]
        if name.endswith(".sh"):
            script = next(ROOT.glob(f"{name[:2]}_*.py"))
            partial_options(load_script(script), arguments, line)
            return
        main = command_line.main if name == "curation" else importlib.import_module(name.removesuffix(".py")).main
        if "--list_models" in arguments:
            assert main(arguments) == 0, line
            return
        if arguments == ["--help"]:
            return
        with only_parsing(monkeypatch), pytest.raises(Parsed):
            main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On pages that start with a job, each line is one; on the others those that run a stage or a command."""
    monkeypatch.setattr("sys.argv", ["curation"])
    saved = saved_files(page.read_text("utf-8"))
    for line in code_lines(page):
        if (page not in JOBS and not PROGRAMS.search(line)) or any(name in line for name in saved):
            continue
        try:
            parses(line, monkeypatch)
        except UsageError as error:
            pytest.fail(f"{page.name}: {line}\n{error}")
        except pytest.fail.Exception:
            pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


def test_a_wrong_flag_in_a_job_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["curation"])
    for line in (
        "curation select tables --baselin basic --out keep.npy",
        "srun .venv/bin/curation verify a b --wrokers 3",
        "python3 04_reshard.py --input a --output b --subst c",
        "A=b sbatch --array=0-3 05_recaption.sh --modle x",
        "export FLAGS_03='--modle x'",
        "./run_pipeline.sh -- --shrads 3",
    ):
        with pytest.raises((UsageError, pytest.fail.Exception)):
            parses(line, monkeypatch)
    with pytest.raises(AssertionError):
        parses("rm -r shards", monkeypatch)


@pytest.mark.parametrize("page", JOBS, ids=lambda page: page.stem)
def test_a_job_starts_with_commands_and_enters_the_environment(page: Path) -> None:
    text = page.read_text("utf-8")
    head = text.partition("```bash")[0]
    assert "**You get**" in head and "**You need**" in head
    first = blocks(page)[0]
    assert ENTER in first
    assert next(line for line in first if not line.startswith("./install.sh")) == ENTER
    assert re.search(r"What to check|\*\*Check\*\*", text)
    assert re.search(r"What can go wrong", text)


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    for page in sorted(DOCS.rglob("*.md")):
        if page.name != "README.md" and page.parent.name != "decisions":
            assert f"({page.relative_to(DOCS)})" in index, f"docs/README.md does not name {page.relative_to(DOCS)}"


# ---- DataComp's baselines, as their page says


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """ROOT, with DataComp's published tables in ``datacomp`` and stage 06's in ``scores``, for two example shards."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("duckdb")
    pytest.importorskip("fasttext")
    (tmp_path / "shards").mkdir()
    rows: list[dict[str, Any]] = []
    for shard in ("00000000", "00000003"):
        (tmp_path / "shards" / f"{shard}.tar").symlink_to(EXAMPLES / f"{shard}.tar")
        for sample in read_samples(EXAMPLES / f"{shard}.tar"):
            rows.append(_datacomp_row(sample.members["json"], len(rows)))
    for folder, names in (("datacomp", {}), ("scores", {"text": "caption"})):
        (tmp_path / folder).mkdir()
        table = pa.Table.from_pylist([{names.get(name, name): value for name, value in row.items()} for row in rows])
        if folder == "scores":
            table = table.append_column(
                "language", pa.array(["en", "de"] * (len(rows) // 2) + ["en"] * (len(rows) % 2))
            )
        pq.write_table(table, tmp_path / folder / "00000000.parquet")
    return tmp_path


def _datacomp_row(metadata: bytes, number: int) -> dict[str, Any]:
    told = json.loads(metadata)
    return {
        "uid": told["uid"],
        "url": told["url"],
        "text": told["caption"],
        "original_width": told["original_width"],
        "original_height": told["original_height"],
        "clip_b32_similarity_score": 0.2 + number / 200,
        "clip_l14_similarity_score": 0.2 + number % 10 / 50,
        "sha256": told["sha256"],
    }


def test_the_pages_of_baselines_and_subsets_run(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their commands in their order, but for downloads and for CLIP, whose table is there already."""
    pq = pytest.importorskip("pyarrow.parquet")
    kept: dict[str, int] = {}
    pages = [DOCS / "jobs" / "datacomp-baselines.md", DOCS / "jobs" / "subset.md"]
    for line in (line for page in pages for line in code_lines(page)):
        words = shlex.split(line.replace("$ROOT", str(tables)).replace("$SHARDS", f"{tables}/shards"))
        fetched = any(name in line for name in ("text_based", "image_based"))  # they run in test_baselines.py
        if words[0] != "curation" or words[1] == "models" or "oai-clip" in line or fetched:
            continue
        if words[1] == "download":  # here is no internet; its table is made by the page's Python
            (snippet,) = re.findall(r"^```python\n(.*?)^```", pages[0].read_text("utf-8"), flags=re.M | re.S)
            monkeypatch.setenv("ROOT", str(tables))
            exec(compile(snippet, pages[0].name, "exec"), {})
            words.append("--dry_run")
        assert command_line.main(words[1:]) == 0, line
        if words[1] == "select":
            out = Path(words[words.index("--save_path" if "--save_path" in words else "--out") + 1])
            folder = Path(words[words.index("--metadata_dir") + 1] if "--metadata_dir" in words else words[2])
            kept[f"{folder.name} {out.stem}"] = len(np.load(out))
        elif "--dry_run" not in words:
            output = Path(words[words.index("--output") + 1])
            kept[f"{words[1]} {output.name}"] = sum(1 for _ in samples_of(output))
    assert pq.read_metadata(tables / "chosen.parquet").num_rows == kept["datacomp clip_l14_30"]
    assert kept["datacomp no_filter"] == 23
    assert kept["datacomp clip_l14_30"] >= int(23 * 0.3) + 1
    assert kept["datacomp clip_b32_30"] == int(23 * 0.3) + 1
    assert 0 < kept["datacomp clip_b32_028"] < kept["datacomp clip_b32_025"] < 23
    assert 0 < kept["reshard basic"] < 23
    assert kept["metadata laion2b"] == 0, "the example shards record no scores"
    assert 0 < kept["datacomp basic_l14_30"] < kept["datacomp basic"] < 23
    assert 0 < kept["scores basic_l14_30"] < kept["scores basic"]
    assert 0 < kept["metadata keep"] == kept["reshard subset"] < 23


def samples_of(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("*.tar")):
        yield from read_samples(path)


def test_every_baseline_has_its_command() -> None:
    pytest.importorskip("duckdb")
    from curation.commands.tables.baselines import BASELINES

    text = (DOCS / "jobs" / "datacomp-baselines.md").read_text("utf-8")
    named = re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", text, flags=re.M)))
    for name in BASELINES:
        assert f"--baseline {name} " in text, f"no command for {name}"
        assert name in named, f"{name} is not in the table"
