"""Agreement of two judges: kappa as scikit-learn has it, its interval, and what is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.commands.tables.agreement import agreement, main

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def scored(seed: int) -> tuple[Any, Any]:
    """Sixty pairs of scores; the second judge is off by up to ``seed``."""
    random = np.random.default_rng(seed)
    first = random.integers(1, 6, 60)
    return first, np.clip(first + random.integers(-seed, seed + 1, 60), 1, 5)


def counts(first: Any, second: Any) -> Counter[Any]:
    return Counter(zip(map(int, first), map(int, second), strict=True))


def by_definition(first: Any, second: Any, categories: range) -> float:
    """Cohen's: the matrix of observed pairs, that of independent judges, and the weights."""
    observed = np.zeros((len(categories), len(categories)))
    for x, y in zip(first, second, strict=True):
        observed[categories.index(int(x)), categories.index(int(y))] += 1
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    weights = np.subtract.outer(np.arange(len(categories)), np.arange(len(categories))) ** 2
    return float(1 - (weights * observed).sum() / (weights * expected).sum())


# Of ``scored(seed)``, by scikit-learn 1.9.1: cohen_kappa_score(first, second, weights="quadratic", labels=range(1, 6))
SKLEARN = {0: 1.0, 1: 0.8816970356268697, 2: 0.7805267358339983, 3: 0.5379413974455296}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_kappa_is_that_of_scikit_learn(seed: int) -> None:
    first, second = scored(seed)
    found = agreement(counts(first, second), draws=0, seed=0)
    assert found["kappa"] == pytest.approx(SKLEARN[seed], abs=1e-12)
    assert found["kappa"] == pytest.approx(by_definition(first, second, range(1, 6)), abs=1e-12)
    assert found["equal"] == (first == second).mean() and found["within_1"] == (abs(first - second) <= 1).mean()


def test_scores_that_nobody_gives_change_nothing() -> None:
    first, second = [1, 2, 4, 5, 5], [2, 2, 4, 4, 1]
    found = agreement(counts(first, second), draws=0, seed=0)["kappa"]
    assert found == pytest.approx(by_definition(first, second, range(1, 6)), abs=1e-12)
    assert found == pytest.approx(by_definition(first, second, range(11)), abs=1e-12)


def test_the_interval_is_the_bootstrap_over_rows() -> None:
    first, second = scored(2)
    found = agreement(counts(first, second), draws=2000, seed=5)
    random = np.random.default_rng(1)
    drawn = [random.integers(0, 60, 60) for _ in range(1000)]
    low, high = np.percentile([by_definition(first[rows], second[rows], range(1, 6)) for rows in drawn], [2.5, 97.5])
    assert found["interval"] == pytest.approx([low, high], abs=0.03)
    assert found["interval"] == agreement(counts(first, second), draws=2000, seed=5)["interval"]
    assert found["interval"] != agreement(counts(first, second), draws=2000, seed=6)["interval"]


def test_kappa_that_is_not_defined() -> None:
    assert agreement({(3, 3): 10, (None, 3): 2}, draws=100, seed=0) == {
        "both": 10, "kappa": None, "interval": None, "equal": 1.0, "within_1": 1.0,
        "first_null": 2, "second_null": 0, "both_null": 0,
    }  # fmt: skip
    nothing = agreement({(None, None): 4, (1, None): 3}, draws=100, seed=0)
    assert (nothing["both"], nothing["kappa"], nothing["equal"]) == (0, None, None)
    assert (nothing["second_null"], nothing["both_null"]) == (3, 4)


# ---- the command


def table(
    path: Path, judges: dict[str, list[str]], columns: dict[str, list[Any]], *, rubric: str = "?", high: int = 5
) -> None:
    path.parent.mkdir(exist_ok=True)
    told = {
        "models": {
            name: {"name": "m", "axes": dict.fromkeys(axes, rubric), "scale": [1, high]}
            for name, axes in judges.items()
        }
    }
    fields = [(name, pa.string() if name == "key" else pa.int64()) for name in columns]
    schema = pa.schema(fields).with_metadata({"curation": json.dumps(told)})
    parquet.write_table(pa.table(columns, schema=schema), path)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_two_judges_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (list(map(int, values)) for values in scored(1))
    for shard, rows in (("0", slice(0, 25)), ("1", slice(25, 60))):
        table(
            tmp_path / f"t/{shard}.parquet",
            {"judge:a": ["x", "only"], "judge:b": ["x", "y"]},
            {
                "key": [*map(str, range(len(first[rows]))), "n", "m"],
                "judge_a_x": [*first[rows], None, 3],
                "judge_b_x": [*second[rows], None, None],
                "judge_a_only": [1] * (len(first[rows]) + 2),
            },
        )
    assert main([str(tmp_path / "t"), "--json"]) == 0
    found = told(capsys)["axes"]
    assert [*found] == ["x"] and found["x"]["columns"] == ["judge_a_x", "judge_b_x"]
    assert found["x"]["kappa"] == pytest.approx(SKLEARN[1])
    assert (found["x"]["both"], found["x"]["second_null"], found["x"]["both_null"]) == (60, 2, 2)
    assert main([str(tmp_path / "t"), "--columns", "judge_a_only,judge_b_x"]) == 0
    assert "judge_a_only, judge_b_x" in capsys.readouterr().out


def test_judges_of_two_folders_are_joined_by_shard_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (list(map(int, values)) for values in scored(2))
    keys = [f"k{number}" for number in range(60)]
    table(tmp_path / "a/0.parquet", {"judge": ["x"]}, {"key": [*keys, "z"], "judge_x": [*first, 1]})
    table(tmp_path / "b/0.parquet", {"judge": ["x"]}, {"key": keys[::-1], "judge_x": second[::-1]})
    table(tmp_path / "b/1.parquet", {"judge": ["x"]}, {"key": ["y"], "judge_x": [5]})
    assert main([str(tmp_path / "a"), "--other", str(tmp_path / "b"), "--json"]) == 0
    found = told(capsys)
    assert found["axes"]["x"]["kappa"] == pytest.approx(SKLEARN[2]) and found["unmatched_rows"] == 2
    table(tmp_path / "a/0.parquet", {"judge": ["x"]}, {"key": [*keys, "k0", None], "judge_x": [*first, 1, 1]})
    assert main([str(tmp_path / "a"), "--other", str(tmp_path / "b"), "--json"]) == 0
    found = told(capsys)
    assert (found["axes"]["x"]["both"], found["unmatched_rows"]) == (59, 2 + 1 + 1 + 1), "k0 is not one row"


def test_judges_that_were_not_asked_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of two scales are not compared, nor scores with themselves, nor rows of other shards."""
    columns = {"key": ["k", "l"], "judge_x": [1, 5]}
    table(tmp_path / "a/0.parquet", {"judge": ["x"]}, columns)
    table(tmp_path / "b/0.parquet", {"judge": ["x"]}, columns, high=10)
    table(tmp_path / "c/0.parquet", {"judge": ["x"]}, columns, rubric="Is it sharp?")
    table(tmp_path / "d/1.parquet", {"judge": ["x"]}, columns)
    ours = str(tmp_path / "a")
    for other, says in (
        ("b", "rate on other scales: judge 1-5 and judge 1-10"),
        ("a", "'judge' is compared with itself"),
        ("d", "none of its rows has the shard and the key of a row of"),
    ):
        assert main([ours, "--other", str(tmp_path / other)]) == 2
        assert says in capsys.readouterr().err
    assert main([ours, "--columns", "judge_x,judge_x"]) == 2 and "with itself" in capsys.readouterr().err
    assert main([ours, "--other", str(tmp_path / "b"), "--columns", "judge_x,judge_x"]) == 0, "as it was asked for"
    capsys.readouterr()
    assert main([ours, "--other", str(tmp_path / "c")]) == 0
    told = capsys.readouterr()
    assert "asked about x with different rubrics" in told.err and "1.000" in told.out


def test_why_kappa_is_not_defined_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges = {"judge:a": ["x", "y", "z"], "judge:b": ["x", "y", "z"], "judge:A B": ["x"]}
    columns: dict[str, list[Any]] = {"key": ["k", "l"], "judge_a_x": [3, 3], "judge_b_x": [3, 3]}
    columns |= {"judge_a_y": [None, 1], "judge_b_y": [1, None], "judge_a_z": [1, 2], "judge_b_z": [1, 2]}
    table(tmp_path / "t/0.parquet", judges, columns)
    assert main([str(tmp_path / "t"), "--judges", "judge:a,judge:b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["x", "2", "none"] and lines[3].split()[:3] == ["z", "2", "1.000"]
    assert lines[4] == "kappa is not defined for x: both judges gave all rows one and the same score"
    assert lines[5] == "kappa is not defined for y: no row has the scores of both judges"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "name two judges with --judges"),
        (["--judges", "judge:a,judge:z"], "have no 'judge:z'; there are: judge:a, judge:b, judge:c"),
        (["--judges", "judge:a,judge:c"], "share no axis"),
        (["--columns", "judge_a_x"], "--columns takes two columns"),
        (["--columns", "judge_a_x,judge_a_z"], "there is no column 'judge_a_z'"),
        (["--columns", "judge_a_x,words"], "'words' has no whole numbers"),
        (["--columns", "judge_a_x,huge"], "'huge' has numbers above"),
        (["--judges", "judge:a,judge:b", "--seed", "-1"], "--seed"),
    ],
)
def test_what_cannot_be_compared(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = {"judge:a": ["x"], "judge:b": ["x"], "judge:c": ["y"]}
    columns: dict[str, list[Any]] = {"key": ["k"], "judge_a_x": [1], "judge_b_x": [1], "judge_c_y": [1]}
    table(tmp_path / "t/0.parquet", judges, columns)
    whole = parquet.read_table(tmp_path / "t/0.parquet").append_column("words", pa.array(["w"]))
    whole = whole.append_column("huge", pa.array([1 << 63], pa.uint64()))
    parquet.write_table(whole, tmp_path / "t/0.parquet")
    assert main([str(tmp_path / "t"), *flags]) == 2
    assert says in capsys.readouterr().err
