"""Stage 04: wrong folders are refused, a run with nothing to do is none of them, and one tar goes by its own files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curation.run.ledger import Ledger
from tests import ROOT
from tests.shards import samples_of
from tests.stages.harness import hashes
from tests.stages.test_stage_04_reshard import EDIT, Stage04, generate, tar_of_edits, triples

STAGES = ("01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Stage04:
    """Two shards of three samples; no edits yet."""
    run = Stage04(tmp_path, capsys)
    for shard in "01":
        run.put(f"shards/{shard}.tar", triples("abc"))
    (tmp_path / "edits").mkdir()
    return run


def ran(folder: Path, stage: str, home: str = "") -> None:
    """As if a stage had run there; home: its output folder, if that is another one."""
    receipts = folder / "_receipts" / stage
    receipts.mkdir(parents=True)
    if home:
        (receipts / "_home.json").write_text(json.dumps({"output": home}))
    else:
        (receipts / "_epoch.1.json").write_text("{}")


def loose(folder: Path, *keys: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key in keys:
        for suffix, data in EDIT.items():
            (folder / f"{key}.{suffix}").write_bytes(data + key.encode())


def last_line(run: Stage04) -> str:
    return run.log.splitlines()[-1]


def refused(run: Stage04, *arguments: str) -> str:
    """The one line of a run that is refused before it has written anything."""
    before = sorted(run.root.rglob("*"))
    for more in ((), ("--dry_run",)):
        assert run(*arguments, *more) == 2, run.log
        assert sorted(run.root.rglob("*")) == before
    assert run.log.count("\n") == 1
    return run.log


# ---- what came of it


def test_the_last_line_says_how_many_were_replaced(run: Stage04) -> None:
    run.put("edits/0.tar", tar_of_edits("ac"))
    assert run() == 0
    assert last_line(run).endswith("; 2 replaced, 4 copied")
    assert run() == 0
    assert last_line(run).endswith("of 2 shards 2 were done before; 0 replaced, 0 copied")
    workers = run.start("--rerun", "--workers", "2", "--lease_s", "1", text=True)
    last = workers.communicate(timeout=120)[1].splitlines()[-1]
    assert workers.returncode == 0
    assert "2 workers together: 2 done; samples: 6 in" in last
    assert last.endswith("; 2 replaced, 4 copied")


def test_a_subset_or_a_shard_without_edits_is_done_with_nothing_replaced(run: Stage04) -> None:
    run.put("edits/0.tar", tar_of_edits("a"))
    run.prompts("a")
    run.put("prompts/1.json", "{}")
    assert run("--shards", "1") == 0
    assert last_line(run).endswith("; 0 replaced, 3 copied")
    assert run("--input", f"{run.root}/shards/1.tar") == 0
    assert last_line(run).endswith("0 replaced, 0 copied")


def test_all_of_stage_03s_prompts_may_have_been_refused(run: Stage04) -> None:
    """Its receipt says what became of them, so that the folders belong together."""
    run.put("prompts/1.json", "{}")
    run.prompts("a")
    generate(run, "")
    assert run("--shards", "0") == 0
    assert last_line(run).endswith("; 0 replaced, 3 copied; 1 have a prompt and no edit")


def test_blocked_names_the_stage_to_run(run: Stage04) -> None:
    generate(run, "a")
    assert run() == 1
    assert "1 blocked: stage 03 first: 03_generate_images has no receipt for it yet" in run.log
    assert "1 shards are blocked: run stage 03 first, and then the same command again" in run.log
    assert "retry_failed" not in run.log
    assert last_line(run).endswith("; 1 replaced, 2 copied")


@pytest.mark.parametrize("flags", [["--index"], ["--shard_size", "2"]])
def test_without_edits_a_flag_says_what_to_do(run: Stage04, flags: list[str]) -> None:
    arguments = ["--input", f"{run.root}/shards", "--output", f"{run.root}/hybrid", *flags]
    assert run.script.main(arguments) == 0
    assert run.capsys.readouterr().err.splitlines()[-1].endswith("; 0 replaced, 6 copied")


# ---- wrong folders


def test_a_folder_without_any_edit(run: Stage04) -> None:
    assert "holds no edit of any shard (no <shard>.tar nor <shard>/" in refused(run)
    run.put("edits/0.json", "{}")  # stage 01's metadata
    ran(run.root / "edits", STAGES[0], "../captions")
    assert "run stage 03 first" in refused(run)
    run.put("edits/notes/readme.md", "nothing")
    refused(run)
    run.put("edits/photos/a.jpg", "a folder of pictures, as stands beside the edits where their parent is given")
    refused(run)
    loose(run.root / "edits/0", "a")
    assert "no <shard>.tar, and" in refused(run, "--edits_layout", "tar")
    assert run() == 0
    assert last_line(run).endswith("; 1 replaced, 5 copied")


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[1], STAGES[3], "00_download", "05_recaption"])
def test_edits_that_another_stage_made(run: Stage04, stage: str) -> None:
    run.put("edits/0.tar", tar_of_edits("a"))
    ran(run.root / "edits", stage)
    assert f"--edits: {run.root}/edits holds the files of {stage}, and not those of 03_generate_images" in refused(run)


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[2], STAGES[3]])
def test_prompts_that_another_stage_made(run: Stage04, stage: str) -> None:
    run.put("edits/0.tar", tar_of_edits("a"))
    run.prompts("a")
    ran(run.root / "prompts", stage)
    assert f"--prompts: {run.root}/prompts holds the files of {stage}, and not" in refused(run)


def test_prompts_of_no_shard(run: Stage04) -> None:
    run.put("edits/0.tar", tar_of_edits("a"))
    (run.root / "prompts").mkdir()
    told = refused(run)
    assert f"--prompts: {run.root}/prompts holds the prompts of no shard" in told
    assert "run stage 02 first" in told
    assert "holds the prompts of no shard" in refused(run, "--prompts", f"{run.root}/shards")
    run.put("prompts/1.json", "{}")
    assert run("--shards", "1") == 0, "another shard has none yet"
    assert run("--shards", "0") == 1, "another shard has some"
    assert "0 blocked: stage 02 first" in run.log
    shutil.rmtree(run.root / "hybrid")
    (run.root / "prompts/1.json").unlink()
    ran(run.root / "prompts", STAGES[1])
    assert run() == 1, "stage 02 has only begun"
    assert "run stage 02 first" in run.log


@pytest.mark.parametrize("stage", STAGES[:2])
def test_an_output_folder_of_another_stage(run: Stage04, stage: str) -> None:
    run.put("edits/0.tar", tar_of_edits("a"))
    ran(run.root / "hybrid", stage)
    told = refused(run)
    assert f"--output: {run.root}/hybrid holds the files of {stage}" in told
    assert "give a new folder, or the one that stage 04 wrote" in told
    ran(run.root / "hybrid", STAGES[3])
    assert "holds the files of" not in (run("--dry_run"), run.log)[1], "it has gone on there before"


def test_swapped_folders(run: Stage04) -> None:
    run.prompts("a")
    swapped = ["--edits", f"{run.root}/prompts", "--prompts", f"{run.root}/edits"]
    run.put("edits/0.tar", tar_of_edits("a"))
    assert "holds no edit of any shard" in refused(run, *swapped), "made elsewhere"
    ran(run.root / "prompts", STAGES[1])
    ran(run.root / "edits", STAGES[0], "../captions")
    assert "were swapped" in refused(run, *swapped)


def test_the_source_folder_as_edits(run: Stage04) -> None:
    assert "they would replace themselves" in refused(run, "--edits", f"{run.root}/shards")


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_prompts_of_which_none_has_an_edit(run: Stage04, layout: str) -> None:
    run.prompts("a", "b")
    run.put("prompts/1.json", "{}")
    run.put("edits/7.tar", tar_of_edits("a")) if layout == "tar" else loose(run.root / "edits/7", "a")
    told = refused(run)
    assert f"has an edit of none of the 2 samples that --prompts names (such as {run.root}/prompts/0.json: a)" in told
    assert "none of the 2" in refused(run, "--on_missing", "drop")
    assert "none of the 2" in refused(run, "--shard_size", "2")
    assert run("--shards", "1") == 0, "no prompt names a sample of this one"
    run.put("edits/0.tar", tar_of_edits("b")) if layout == "tar" else loose(run.root / "edits/0", "b")
    assert run() == 0
    assert last_line(run).endswith("; 1 replaced, 2 copied; 1 have a prompt and no edit")


# ---- one tar


def one_tar(run: Stage04, shard: str, edits: str, *more: str) -> list[str]:
    places = ["--input", f"{run.root}/shards/{shard}.tar", "--output", f"{run.root}/hybrid/{shard}.tar"]
    return [*places, "--edits", f"{run.root}/{edits}", *more]


def test_one_tar_by_its_own_files(run: Stage04, capsys: pytest.CaptureFixture[str]) -> None:
    loose(run.root / "edits/0", "a", "c")
    loose(run.root / "edits/1", "b")
    for shard, told in (("0", "2 replaced, 1 copied"), ("1", "1 replaced, 2 copied")):
        assert run.script.main(one_tar(run, shard, f"edits/{shard}")) == 0
        assert capsys.readouterr().err.splitlines()[-1].endswith(told)
    assert samples_of(run.result("0"))["c"]["jpg"] == EDIT["jpg"] + b"c"
    assert sorted(path.name for path in (run.root / "hybrid").glob("[!_.]*")) == ["0.tar", "1.tar"]
    assert run.records.receipts(run.folder).keys() == {"0", "1"}
    alone = hashes(run.folder)
    assert run() == 0, "all of them together go on there"
    assert "2 were done before" in last_line(run)
    shutil.rmtree(run.folder)
    assert run() == 0
    assert hashes(run.folder) == alone


def test_the_list_of_wids_has_the_tars_of_all_calls(run: Stage04) -> None:
    for shard in "01":
        loose(run.root / f"edits/{shard}", "a")
        assert run.script.main(one_tar(run, shard, f"edits/{shard}", "--index")) == 0
    listed = json.loads((run.folder / "wids.json").read_bytes())["shardlist"]
    assert [one["url"] for one in listed] == ["0.tar", "1.tar"]


def test_calls_for_several_tars_at_once(run: Stage04) -> None:
    for shard in "0123":
        run.put(f"shards/{shard}.tar", triples("abc"))
        loose(run.root / f"edits/{shard}", "b")
    (run.root / "edits/3/b.jpg").unlink()  # no edit
    started = [
        subprocess.Popen([sys.executable, "04_reshard.py", *one_tar(run, shard, f"edits/{shard}")], cwd=ROOT)
        for shard in "0123"
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0, 0]
    done = run.records.receipts(run.folder)
    assert {shard: receipt["notes"]["edited"] for shard, receipt in done.items()} == {"0": 1, "1": 1, "2": 1, "3": 0}
    ledger = Ledger(run.folder, run.stage, 1, {}, read_only=True)
    ledger.load_options_versions()
    assert not (ledger.receipts / "_epoch.2.json").exists()


@pytest.mark.parametrize("edits", ["edits", "edits/0.tar", "edits/0"])
def test_each_name_for_the_edits_of_one_tar(run: Stage04, edits: str) -> None:
    """A shard without edits has no folder of its own, and that is no fault."""
    if edits == "edits/0":
        run.put("edits/1.tar", tar_of_edits("a"))
    else:
        run.put("edits/0.tar", tar_of_edits("a"))
    run.prompts("a") if edits != "edits/0" else run.prompts()
    assert run.script.main(one_tar(run, "0", edits, "--prompts", f"{run.root}/prompts/0.json")) == 0
    assert (run.root / "hybrid/0.tar").is_file()
    assert run.receipt()["notes"]["edited"] == (edits != "edits/0")


def test_names_that_are_not_of_one_tar(run: Stage04) -> None:
    loose(run.root / "edits/0", "a")
    assert "names one tar, and --input 2 shards" in refused(run, "--output", f"{run.root}/hybrid/0.tar")
    single = ["--input", f"{run.root}/shards/1.tar"]
    assert "is written as 1.tar" in refused(run, *single, "--output", f"{run.root}/hybrid/0.tar")
    assert "must be a folder" in refused(run, *single, "--output", f"{run.root}/hybrid/1.tar", "--shard_size", "2")
    assert "not packed: give a folder" in refused(run, *single, "--output", f"{run.root}/hybrid/1.tar.gz")
    loose(run.root / "mine", "a")
    assert "its folder must be named 1" in refused(run, *single, "--edits", f"{run.root}/mine")
    run.put("edits/0.tar", tar_of_edits("a"))
    both = ["--input", f"{run.root}/shards/0.tar", "--edits", f"{run.root}/edits/0"]
    assert "say which: --edits_layout" in refused(run, *both)
    assert run(*both, "--edits_layout", "files") == 0


def test_a_folder_that_an_older_version_named_like_a_tar_goes_on(run: Stage04) -> None:
    loose(run.root / "edits/0", "a")
    (run.root / "hybrid/0.tar").mkdir(parents=True)
    assert run.script.main(one_tar(run, "0", "edits/0")) == 0
    assert (run.root / "hybrid/0.tar/0.tar").is_file()


def test_the_shell_script_takes_one_tar(run: Stage04) -> None:
    loose(run.root / "edits/0", "a", "b")
    places: dict[str, Any] = {"SRC_DIR": "shards/0.tar", "TARGET_DIR": "hybrid/0.tar", "EDITS_DIR": "edits/0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {name: str(run.root / path) for name, path in places.items()} | {"PYTHON": sys.executable}
    for _ in range(2):
        done = subprocess.run(["bash", str(ROOT / "04_reshard.sh")], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (run.root / "hybrid/0.tar").is_file()
    assert run.receipt()["notes"]["edited"] == 2
