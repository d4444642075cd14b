"""The commit protocol: every interleaving of three attempts at one shard, each of which may be killed at any point.

test_commit_lockstep shows that the real code takes the steps of this model.
"""

from __future__ import annotations

import pytest

from tests.run.commit_model import Attempt, Model, Rules
from tests.run.commit_search import Violation, search

BOTH = ("A", "B")
SUCCESSOR = Attempt("s", BOTH)


def attempts(*outputs: tuple[str, ...]) -> tuple[Attempt, ...]:
    return tuple(Attempt(token, paths) for token, paths in zip("abc", outputs, strict=False))


@pytest.mark.parametrize("eager", [True, False], ids=["rerun", "once"])
@pytest.mark.parametrize("before", [(), BOTH, ("A", "X")], ids=["first", "again", "superseding"])
def test_every_interleaving_of_three_attempts_with_kills(before: tuple[str, ...], eager: bool) -> None:
    """Wherever all that still live are killed, a successor leaves one receipt, what it names, and nothing else."""
    searched = search(Model(attempts(BOTH, BOTH, BOTH), Rules(eager=eager), before), SUCCESSOR)
    assert searched.states > 150_000
    assert searched.folders > 500


def test_attempts_that_publish_different_files() -> None:
    """Two that supersede what another publishes.  A slow one may put aside a file that a newer receipt names by then;
    it puts it back, and only if it is killed right there does a successor have to make the file anew."""
    model = Model(attempts(BOTH, ("A",)), Rules(), BOTH)
    assert search(model, SUCCESSOR).states > 1000
    three = Model(attempts(("A",), BOTH, ("A",)), Rules(eager=False), BOTH)
    assert search(three, SUCCESSOR).states > 150_000


BROKEN = {
    "without step 3": (Rules(check_void=False), "the receipt is"),
    "the receipt before the outputs": (Rules(receipt_last=False), "the receipt is"),
    "a record that can be replaced": (Rules(link_exclusive=False), "the receipt is"),
    "the receipt read before the record": (Rules(receipt_after_record=False), "the receipt is"),
    "without a look at the claim": (Rules(check_claim=False), "the receipt is"),
    "a file that was superseded is removed under its own name": (Rules(put_aside=False), "the receipt is"),
    "what is named is asked in the other order": (Rules(record_before_receipt=False), "the receipt is"),
    "a file that was superseded is left to the dead": (Rules(tidy_superseded=False), "'X': 'o'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_search_finds_what_is_wrong_with_a_broken_protocol(how: str) -> None:
    rules, wrong = BROKEN[how]
    cast, before = attempts(BOTH, BOTH, BOTH), () if rules.tidy_superseded else ("A", "X")
    if not (rules.put_aside and rules.record_before_receipt):
        cast, before = attempts(BOTH, ("A",)), BOTH
    with pytest.raises(Violation, match=wrong) as caught:
        search(Model(cast, rules, before), SUCCESSOR)
    print(f"{how}:\n{caught.value}")
    assert str(caught.value).count("\n") > 5  # the operations that lead there
