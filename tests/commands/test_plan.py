"""``python -m curation plan``: forecasts from receipts, held against what the rest then cost."""

from __future__ import annotations

import importlib
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from curation.commands.plan.command import parse_tasks, run_sample
from curation.commands.plan.cost import MAX_SIZES, Estimate, evenly, ratio_estimate, sizes_of, t_quantile
from curation.commands.plan.site import Quota, array_commands, job_shape, quotas, read_lustre, read_quota
from curation.errors import UsageError
from curation.shards import discover
from tests import EXAMPLES, ROOT
from tests.pipeline import Undisturbed
from tests.run.toy_runs import Place
from tests.slurm.jobs import small_shards

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """The command's JSON."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", *map(str, arguments), "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert result["format"] == 1
        return result

    return run


# ---- the estimates


def test_what_grows_with_the_size_is_forecast_exactly() -> None:
    estimate = ratio_estimate([10, 20, 30], [5, 10, 15], rest=100, rest_count=4)
    assert estimate == Estimate(50.0, 0.0)


def test_one_shard_gives_no_error_bar_and_none_to_come_costs_nothing() -> None:
    assert ratio_estimate([10], [5], rest=100, rest_count=4) == Estimate(50.0, None)
    assert ratio_estimate([10], [5], rest=0, rest_count=0) == Estimate(0.0, 0.0)
    with pytest.raises(ValueError):
        ratio_estimate([], [], rest=1, rest_count=1)


def test_the_interval_covers_what_it_says() -> None:
    """Of 400 datasets of 60 shards of which 5 are measured, about 95 % lie within the bars."""
    source = random.Random(7)
    covered = 0
    for _ in range(400):
        sizes = [source.uniform(5, 15) for _ in range(60)]
        values = [size * 3 + source.gauss(0, 4) for size in sizes]
        estimate = ratio_estimate(sizes[:5], values[:5], sum(sizes[5:]), 55)
        assert estimate.error is not None
        covered += abs(estimate.value - sum(values[5:])) <= estimate.error
    assert 0.91 <= covered / 400 <= 0.985


def test_students_t_falls_towards_the_normal_distribution() -> None:
    quantiles = [t_quantile(degrees) for degrees in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(1.972, abs=0.003)


def test_a_sample_is_spread_over_all() -> None:
    assert evenly(range(10), 3) == [1, 5, 8]
    assert evenly(range(2), 3) == [0, 1]


# ---- forecasts of shards that are then done


def test_the_time_of_a_held_out_set_is_forecast_within_a_fifth(tmp_path: Path, plan: Plan) -> None:
    """Shards of 4 to 24 samples of which each takes 20 ms; four are measured."""
    place = Place(tmp_path)
    source = random.Random(3)
    for number in range(16):
        place.shard(f"{number:08d}", *["keep"] * source.randrange(4, 25))
    ids = [shard.id for shard in evenly(discover(str(place.source)), 4)]
    assert place.run("--sample_s", "0.02", "--shards", ",".join(ids)) == 0
    (stage,) = plan(place.source, place.root, "--tasks", "1")["stages"]
    assert (stage["measured"], stage["done"], stage["left"]) == (4, 4, 12)
    assert place.run("--sample_s", "0.02") == 0
    rest = [receipt for name, receipt in place.receipts().items() if name not in ids]
    took = sum(receipt["finished"] - receipt["started"] for receipt in rest)
    assert stage["worker_hours_to_come"]["value"] * 3600 == pytest.approx(took, rel=0.2)
    assert stage["wall_clock_s"]["value"] == pytest.approx(took, rel=0.2)
    assert stage["sbatch"] == [], "no script of the project is called toy"


def test_the_bytes_of_a_held_out_set_are_forecast_within_a_fifth(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "in").mkdir()
    shards, root = small_shards(tmp_path / "in", 12), tmp_path / "root"
    script = importlib.import_module("01_filter_noface")
    reshard = importlib.import_module("04_reshard")
    ids = ",".join(shard.id for shard in evenly(discover(str(shards)), 4))

    def run(*more: str) -> None:
        place = ["--input", str(shards), "--quiet"]
        first = ["--output", f"{root}/captions", "--edits", f"{root}/edits", "--detector", "recorded"]
        assert script.main([*place, *first, *more]) == 0
        copy = ["--output", f"{root}/shards", "--index"]
        assert reshard.main([*place, *copy, *more]) == 0

    run("--shards", ids)
    result = plan(shards, root)
    forecast = {stage["stage"]: stage for stage in result["stages"]}
    assert set(forecast) == {"01_filter_noface", "04_reshard"}
    run()
    for name, stage in forecast.items():
        receipts = [json.loads(path.read_bytes()) for path in root.glob(f"*/_receipts/{name}/*/0*.json")]
        outputs = [output["size"] for receipt in receipts for output in receipt["outputs"]]
        assert stage["bytes"]["value"] == pytest.approx(sum(outputs), rel=0.2)
        assert abs(stage["bytes"]["value"] - sum(outputs)) <= stage["bytes"]["error"]
        assert stage["files"]["value"] == pytest.approx(len(outputs) + len(receipts), rel=0.2)
    (line,) = forecast["04_reshard"]["sbatch"]
    assert line == f"ROOT={root} SRC_DIR={shards} sbatch 04_reshard.sh"
    after = plan(shards, root)
    assert [(stage["left"], stage["sbatch"]) for stage in after["stages"]] == [(0, []), (0, [])]
    assert after["bytes_to_come"] == {"value": 0.0, "error": 0.0}


def test_tokens_devices_and_names_of_a_real_run(undisturbed: Undisturbed, plan: Plan) -> None:
    result = plan(undisturbed.root / "shards", undisturbed.root, "--tasks", "01=8,03=16")
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert set(stages) == {"01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"}
    asked = stages["02_captions_processor"]
    assert asked["tokens_read"]["value"] > 0
    assert asked["tokens_written"]["value"] > 0
    receipts = [json.loads(path.read_bytes()) for path in undisturbed.root.glob("prompts/_receipts/*/*/0*.json")]
    assert asked["tokens_read"]["value"] == sum(
        receipt["notes"].get("tokens", {}).get("read", 0) for receipt in receipts
    )
    assert stages["03_generate_images"]["gpu_hours"]["value"] == 0
    assert stages["03_generate_images"]["open_s"] > 0, "loading its model took a while"
    assert any("without a GPU" in warning for warning in result["warnings"])


def test_shards_in_hand_at_once_count_once(tmp_path: Path, plan: Plan) -> None:
    place = Place(tmp_path)
    place.shards(4, *["keep"] * 20)
    assert place.run("--sample_s", "0.01", "--in_flight", "4") == 0
    (stage,) = plan(place.source, place.root)["stages"]
    walls = sum(receipt["finished"] - receipt["started"] for receipt in place.receipts().values())
    assert 20 * 0.01 <= stage["worker_hours"]["value"] * 3600 < walls / 2, "each shard took the time of all four"


def test_the_text_shows_bars_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    place.shards(5)
    assert place.run("--shards", "00000002") == 0
    assert main(["plan", str(place.source), str(place.root)]) == 0
    text = capsys.readouterr().out
    assert "toy: 1 done, 4 to do, 1 measured" in text
    assert "± ?" in text, "one shard gives no error bar"
    assert "1 measured shards are too few" in text


# ---- jobs


def test_the_job_of_every_stage_is_read_from_its_script() -> None:
    shape = job_shape(ROOT / "03_generate_images.sh")
    assert shape is not None
    assert (shape.script, shape.tasks, shape.cpus, shape.gpus) == ("03_generate_images.sh", 4, 8, True)
    assert all(job_shape(script) for script in ROOT.glob("0*.sh"))
    assert job_shape(ROOT / "none.sh") is None


def test_arrays_stay_under_the_sites_limit() -> None:
    shape = job_shape(ROOT / "04_reshard.sh")
    assert shape is not None
    commands = array_commands(shape, {"ROOT": "/a b"}, 25, 10, ["--quiet"])
    assert commands == [
        "ROOT='/a b' sbatch --array=0-9 04_reshard.sh --quiet",
        "ROOT='/a b' sbatch --array=0-9 04_reshard.sh --quiet",
        "ROOT='/a b' sbatch --array=0-4 04_reshard.sh --quiet",
    ]


def test_as_many_workers_as_the_time_asks_for(tmp_path: Path, plan: Plan) -> None:
    place = Place(tmp_path)
    place.shards(12, *["keep"] * 10)
    assert place.run("--sample_s", "0.02", "--shards", "00000000..00000003") == 0
    (stage,) = plan(place.source, place.root, "--within", 1 / 3600)["stages"]  # 1.6 s of work, 0.2 s a shard
    assert 2 <= stage["tasks"] <= 5
    assert stage["wall_clock_s"]["value"] < 1.2
    (stage,) = plan(place.source, place.root, "--tasks", "1000")["stages"]
    assert stage["tasks"] == 8, "no more than there are shards to do"


@pytest.mark.parametrize("text", ["0", "01=", "=4", "x", "01=1,02"])
def test_tasks_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="--tasks"):
        parse_tasks(text)
    assert parse_tasks("01=64, 03=8") == {"01": 64, "03": 8}


# ---- room


def test_room_on_the_filesystem(tmp_path: Path) -> None:
    found = quotas(tmp_path / "not" / "there yet")
    system = os.statvfs(tmp_path)
    assert found[0].what == "the filesystem"
    assert found[0].bytes_left == pytest.approx(system.f_bavail * system.f_frsize, rel=0.1)


def test_quotas_as_the_programs_print_them() -> None:
    lustre = "/lustre/project\n   1048576*  2097152 4194304  6d23h59m  90000  100000  120000   -"
    assert list(read_lustre(lustre, "yours")) == [Quota("yours", (4194304 - 1048576) * 1024, 30000)]
    assert list(read_lustre("/lustre 12 0 0 - 5 0 0 -", "yours")) == [Quota("yours", None, None)]
    assert list(read_lustre("lfs quota: no such filesystem", "yours")) == []
    quota = (
        "Disk quotas for user ada (uid 1000):\n"
        "Filesystem  blocks  quota  limit  grace  files  quota  limit  grace\n"
        "/dev/sda1   4000*   3000   5000   0      7      0      10     0\n"
    )
    assert list(read_quota(quota)) == [Quota("your quota", 1000 * 1024, 3)]


def test_it_warns_where_the_room_will_not_do(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``quota`` on the PATH that leaves a single file."""
    fake = tmp_path / "bin" / "quota"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho '/dev/sda1 1 0 100 0 9 0 10 0'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    place = Place(tmp_path / "place")
    place.shards(9)
    assert place.run("--shards", "00000000..00000003") == 0
    warnings = plan(place.source, place.root)["warnings"]
    assert any("your quota has room for 1 more files" in warning for warning in warnings), warnings


# ---- bad input, and the sample


def test_nothing_to_forecast_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    place.shards(2)
    assert main(["plan", str(place.source), str(place.root)]) == 2
    assert "--sample 3" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nowhere"), str(place.root)]) == 2
    assert main(["plan", str(place.source), str(place.root), "--sample", "-1"]) == 2


def test_a_receipt_that_was_made_by_hand_breaks_nothing(tmp_path: Path, plan: Plan) -> None:
    place = Place(tmp_path)
    place.shards(3)
    assert place.run() == 0
    (path,) = place.out.glob("_receipts/toy/*/00000001.json")
    strange = {"status": "done", "started": "x", "outputs": 3, "notes": [], "sources": None, "counts": 7}
    path.write_text(json.dumps(strange))
    (stage,) = plan(place.source, place.root)["stages"]
    assert stage["measured"] == 3


def test_sizes_of_many_shards_are_looked_up_for_some(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.shards(3, "keep")
    shards = discover(str(place.source)) * (MAX_SIZES // 3 + 1)
    sizes = sizes_of(shards)
    assert sizes.total == pytest.approx(5 * len(shards))


def test_a_sample_is_run_and_kept(tmp_path: Path, llm_port: int) -> None:
    """Two of six shards go through stages 01 to 04, even where sbatch could be called."""
    (tmp_path / "in").mkdir()
    shards = small_shards(tmp_path / "in", 6)
    flags = {
        "FLAGS_01": "--detector recorded --quiet",
        "FLAGS_02": "--quiet --api ollama",
        "FLAGS_03": "--embedded --height 64 --width 64 --quiet",
        "FLAGS_04": "--quiet",
        "PORTS": str(llm_port),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "curation", "plan", str(shards), str(tmp_path / "root"), "--sample", "2", "--json"]
    environment = {**os.environ, **flags}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)["stages"]
    assert [(stage["done"], stage["left"]) for stage in stages] == [(2, 4)] * 4
    assert sorted(path.name for path in (tmp_path / "root" / "shards").glob("*.tar")) == [
        "00000001.tar",
        "00000004.tar",
    ]
    assert all("--quiet" in stage["sbatch"][0] for stage in stages), "the flags that were measured"


# ---- the sample's interpreter, and the file of a pipeline


def test_the_sample_runs_with_the_interpreter_that_runs_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run_pipeline.sh").write_text('echo "$PYTHON" > "$ROOT/python"\n')
    monkeypatch.setattr("curation.commands.plan.command.PROJECT", tmp_path)
    monkeypatch.delenv("PYTHON", raising=False)
    assert run_sample(["shards"], tmp_path, ["00000000"]) == 0
    assert (tmp_path / "python").read_text().strip() == sys.executable
    monkeypatch.setenv("PYTHON", "/another/python3")
    run_sample(["shards"], tmp_path, ["00000000"])
    assert (tmp_path / "python").read_text().strip() == "/another/python3"


def test_it_writes_the_file_of_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no stage has run.  The file passes the checks of ``curation run``."""
    monkeypatch.setenv("FLAGS_01", "--detector recorded --min-faces=2")
    monkeypatch.setenv("FLAGS_04", "--verify --no_index")
    monkeypatch.setenv("PORTS", "11434")
    file, root = tmp_path / "pipeline.yaml", tmp_path / "a ${ROOT}"
    asked = ["plan", str(EXAMPLES), str(root), "--write", str(file), "--shards", "00000003"]
    assert main(asked) == 0
    assert "no forecast" in capsys.readouterr().err
    assert main(asked) == 0, "the same content is no mistake"
    assert main(["run", str(file), "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".py " in line]
    first, second, third, fourth = (shlex.split(line)[2:] for line in lines)
    assert first == [
        *["--input", str(EXAMPLES), "--output", f"{root}/captions", "--edits", f"{root}/edits"],
        *["--detector", "recorded", "--min_faces", "2", "--shards", "00000003"],
    ]  # fmt: skip
    assert second[4:6] == ["--ports", "11434"]
    assert third[:4] == ["--input", f"{root}/prompts", "--output", f"{root}/edits"]
    assert {"--verify", "--no_index"} <= set(fourth)
    assert main([*asked[:-1], "00000000"]) == 2
    assert "is there already with other content" in capsys.readouterr().err
    monkeypatch.setenv("FLAGS_01", "--detektor recorded")
    assert main([*asked[:4], str(tmp_path / "other.yaml")]) == 2
    assert "FLAGS_01: stage 01_filter_noface has no flag --detektor" in capsys.readouterr().err
