"""Has checks look at encoded pictures: many threads prepare them, and one thread asks the checks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from curation.check import Asked, Check, Verdict
from curation.errors import InfrastructureError, SampleError
from curation.generate.tries import Try
from curation.images import decode_rgb
from curation.models.batch_size import free_memory, shortage_of, use_device

# How long a check waits where the device has no memory for it: the image model needs most only for a part of its time.
_PAUSES_S = (0.5, 2.0, 8.0)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A try, and what each check takes of its picture; nothing where there is no picture."""

    attempt: Try
    pictures: Sequence[Any] = ()


class Judge:
    """The checks of one device.  All shards share it.

    One thread of its own asks them, so that the thread that feeds the device never waits for them.
    """

    def __init__(self, checks: Sequence[Check], device: str = "cpu") -> None:
        """device: torch's name of the one that they compute on; each thread has a current device of its own."""
        self._checks, self._device = checks, device
        self._thread = ThreadPoolExecutor(1, "judge", initializer=use_device, initargs=(device,))

    def prepare(self, attempt: Try) -> Prepared:
        """Decode the JPEG, because its pixels are those that readers will see.  Any thread may call it.

        One that cannot be decoded, which only a file of an earlier run can be, is a try without a picture.
        """
        if attempt.refused is not None:
            return Prepared(attempt)
        try:
            pixels = decode_rgb(attempt.jpg)
        except SampleError as error:
            return Prepared(replace(attempt, refused=(error.reason, error.detail), jpg=b""))
        return Prepared(attempt, [check.prepare(pixels) for check in self._checks])

    def ask(self, prepared: Sequence[Future[Prepared]], asked: Sequence[Asked]) -> Future[list[Try]]:
        """Have a batch judged as soon as its pictures are prepared.

        Args:
            prepared: What ``prepare`` is about to return.
            asked: What each picture was to show.

        Returns:
            The tries with what the checks said.  Those without a picture are returned as they are.
        """
        return self._thread.submit(self._judge, prepared, asked)

    def _judge(self, prepared: Sequence[Future[Prepared]], asked: Sequence[Asked]) -> list[Try]:
        all_of_them = [task.result() for task in prepared]
        rows = [row for row, one in enumerate(all_of_them) if one.pictures]
        verdicts: list[dict[str, Any]] = [{} for _ in rows]
        for number, check in enumerate(self._checks if rows else ()):
            pictures = [all_of_them[row].pictures[number] for row in rows]
            said = self._verdicts(check, pictures, [asked[row] for row in rows])
            for of_one, verdict in zip(verdicts, said, strict=True):
                of_one[check.name] = verdict
        tries = [one.attempt for one in all_of_them]
        for row, of_one in zip(rows, verdicts, strict=True):
            tries[row] = tries[row].judged(of_one)
        return tries

    def _verdicts(self, check: Check, pictures: Sequence[Any], asked: Sequence[Asked]) -> list[Verdict]:
        """What one check says.  Where memory does not suffice beside the image model, it is asked again a little later.

        Raises:
            InfrastructureError: It did not suffice later either.
        """
        said = ""
        for pause in (*_PAUSES_S, 0.0):
            try:
                return check.judge(pictures, asked)
            except Exception as error:
                shortage = shortage_of(error)
                if shortage is None or not shortage.certain:
                    raise
                said = shortage.text
            free_memory(self._device)
            time.sleep(pause)
        raise InfrastructureError(
            f"--check {check.name}: there is too little memory for it beside the image model, also after "
            f"{sum(_PAUSES_S):g} seconds ({said}): give a smaller --batch_size"
        )

    def close(self) -> None:
        """End the thread, and let go of the models."""
        self._thread.shutdown(cancel_futures=True)
        for check in self._checks:
            check.close()
