"""Groups: tables that users write, and a deal that is even and always the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.errors import UsageError
from curation.rewrite.groups import assign_groups, read_groups

DEFAULT = read_groups("default")


def test_the_published_twelve() -> None:
    assert len(DEFAULT) == 12
    assert DEFAULT[:3] == ("black male", "black female", "white male")
    assert "middle east female" in DEFAULT


def test_none() -> None:
    assert read_groups("none") == ()
    assert assign_groups(["a", "b"], "0", (), 0) == {"a": None, "b": None}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("[tall, short]", ("tall", "short")),
        ("age: [young, old]\ngender: [man, woman]\n", ("young man", "young woman", "old man", "old woman")),
        ("only: [one]", ("one",)),
    ],
)
def test_tables_of_ones_own(tmp_path: Path, text: str, groups: tuple[str, ...]) -> None:
    (tmp_path / "groups.yaml").write_text(text)
    assert read_groups(str(tmp_path / "groups.yaml")) == groups


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write a list"),
        ("just a text", "write a list"),
        ("a: b", "write a list"),
        ("[]", "write a list"),
        ("a: []", "write a list"),
        ("[1, 2]", "is not a text"),
        ("['']", "is not a text"),
        ("['a\"b']", "is not a text"),
        ("['a\\nb', \"c\\nd\"]", "control characters"),
        ("[same, same]", "twice"),
        ("[" + "[" * 30_000, "not YAML"),
        ("{unclosed: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("a: &a [x, y]\nb: [*a, *a]", "is not a text"),
        ("x" * 70_000, "more than"),
        ("\n".join(f"a{n}: [{', '.join(map(str, 'abcdefghij'))}]" for n in range(5)), "at most"),
        ("2026-01-01: [2026-99-99]", "not YAML"),
        ("when: [2026-01-01]", "is not a text"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "groups.yaml").write_text(text)
    with pytest.raises(UsageError, match=says):
        read_groups(str(tmp_path / "groups.yaml"))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give default, none or a YAML file"):
        read_groups(str(tmp_path / "no.yaml"))


@settings(max_examples=100)
@given(st.lists(st.text(max_size=10), unique=True, max_size=60), st.text(max_size=5), st.integers(0, 2**63))
def test_each_group_equally_often_to_within_one(keys: list[str], shard: str, seed: int) -> None:
    dealt = assign_groups(keys, shard, DEFAULT, seed)
    assert set(dealt) == set(keys)
    counts = Counter(dict.fromkeys(DEFAULT, 0) | Counter(dealt.values()))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_same_deal_whatever_the_order() -> None:
    keys = [f"{n:012d}" for n in range(50)]
    assert assign_groups(keys, "00000001", DEFAULT, 7) == assign_groups(reversed(keys), "00000001", DEFAULT, 7)


def test_this_very_deal() -> None:
    """Other bytes would make the prompts of a resumed run another data set."""
    dealt = assign_groups(["a", "b", "c"], "00000000", DEFAULT, 0)
    assert dealt == {"b": "black male", "a": "black female", "c": "white male"}


def test_seed_and_shard_matter() -> None:
    keys = [f"{n:012d}" for n in range(50)]
    first = assign_groups(keys, "00000001", DEFAULT, 0)
    assert assign_groups(keys, "00000001", DEFAULT, 1) != first
    assert any(assign_groups(keys, f"{shard:08d}", DEFAULT, 0) != first for shard in range(2, 6))


def test_many_small_shards_do_not_starve_the_last_groups() -> None:
    counts: Counter[str | None] = Counter()
    for shard in range(600):
        counts += Counter(assign_groups([f"{shard}-{n}" for n in range(3)], f"{shard:08d}", DEFAULT, 0).values())
    assert set(counts) == set(DEFAULT)
    assert max(counts.values()) < 1.5 * min(counts.values())
