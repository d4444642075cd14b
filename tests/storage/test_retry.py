"""What a server asks to wait, waits that double, and the plain loop around a request."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from curation.storage.retry import RetryPolicy, TransientError, retry_after_s, with_retries


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("-1", None),
        ("9" * 5000, None),
        ("Wed, 21 Oct 2026 07:28:10 GMT", 10.0),
        ("Wed, 21 Oct 2020 07:28:10 GMT", 0),
    ],
)
def test_what_retry_after_says(text: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 10, 21, 7, 28, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: now)
    assert retry_after_s(text) == seconds


def test_waits_double_within_their_bound() -> None:
    policy = RetryPolicy(first_wait_s=1.0, longest_wait_s=10.0)
    for failures, bound in ((1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (10_000, 10.0)):
        waits = [policy.wait_s(failures) for _ in range(200)]
        assert bound / 2 <= min(waits) < max(waits) <= bound
    assert policy.wait_s(1, asked_s=7.0) == 7.0
    assert policy.wait_s(1, asked_s=3600.0) == 10.0


def test_a_request_is_sent_again_as_often_as_the_policy_says() -> None:
    policy = RetryPolicy(tries=3, first_wait_s=0.001)
    sent: list[int] = []

    def request(succeeds_at: int) -> str:
        sent.append(1)
        if len(sent) < succeeds_at:
            raise TransientError(f"failure {len(sent)}")
        return "answer"

    assert with_retries(lambda: request(3), policy) == "answer"
    sent.clear()
    with pytest.raises(TransientError, match="failure 3"):
        with_retries(lambda: request(4), policy)
    assert len(sent) == 3
