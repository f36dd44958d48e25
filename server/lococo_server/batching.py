"""Sessions of several threads, stepped in forwards that they share."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from lococo_runtime import Batch, LococoError, Session

from .metrics import Metrics


@dataclass
class _Step:
    session: Session
    token_id: int
    done: Future[None] = field(default_factory=Future)


class SharedSteps:
    """One thread that steps a `Batch` for threads which have a session each.

    A forward begins as soon as all sessions are back that took part in the last one, or have come since. It waits for
    them a quarter of a forward's time at most, so that one whose client is slow does not hold up the others; it takes
    part again when it is back.

    Args:
        batch: empty; closed with this.
        metrics: counts the sessions of each forward.
    """

    def __init__(self, batch: Batch, metrics: Metrics) -> None:
        self._batch, self._metrics = batch, metrics
        self._batch_lock = threading.Lock()
        self._changed = threading.Condition()  # of what follows
        self._steps: list[_Step] = []
        self._expected: set[Session] = set()
        self._closed = False
        self._patience = 0.0  # seconds
        self._thread = threading.Thread(target=self._run, name="lococo-batch")
        self._thread.start()

    def step(self, session: Session, token_id: int) -> None:
        """As `Session.step`, less the logits; the session joins if it has not. Raises as that."""
        step = _Step(session, token_id)
        with self._changed:
            self._steps.append(step)
            self._expected.add(session)
            self._changed.notify()
        step.done.result()

    def leave(self, session: Session) -> None:
        """The session goes on alone, if it was here."""
        with self._changed:
            self._expected.discard(session)
            self._changed.notify()
        with self._batch_lock:
            if session in self._batch.sessions:
                self._batch.remove(session)

    def close(self) -> None:
        """Ends the thread, when no step is under way, and frees the batch."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._batch.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._steps or self._closed)
                if not self._steps:
                    return
                self._changed.wait_for(lambda: len(self._steps) >= len(self._expected), self._patience)
                steps, self._steps = self._steps, []
                self._expected = {step.session for step in steps}
            began = time.monotonic()
            with self._batch_lock:
                self._forward(steps)
            self._patience = (time.monotonic() - began) / 4

    def _forward(self, steps: list[_Step]) -> None:
        """Where a forward of several fails, those that have not read are stepped alone: the error is of one of them."""
        positions = [step.session.position for step in steps]
        try:
            for step in steps:
                if step.session not in self._batch.sessions:
                    self._batch.add(step.session)
            self._batch.step([step.session for step in steps], [step.token_id for step in steps])
        except Exception as e:
            if len(steps) == 1 or not isinstance(e, LococoError):
                for step in steps:
                    step.done.set_exception(e)
                return
            for step, position in zip(steps, positions, strict=True):
                if step.session.position == position:
                    self._forward([step])
                else:
                    step.done.set_result(None)
            return
        self._metrics.step_sessions.observe(len(steps))
        for step in steps:
            step.done.set_result(None)
