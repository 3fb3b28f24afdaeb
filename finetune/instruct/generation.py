"""Asking: several questions at once, again after a fault, never past the budget, every step in the ledger."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from finetune.instruct.budget import Budget, Usage
from finetune.instruct.ledger import Ledger
from finetune.instruct.teachers import NoReply, Reply, Task, Teacher, TeacherError
from finetune.interrupt import StopSignal

ATTEMPTS = 5
LONGEST_PAUSE = 60.0  # s between two attempts, unless the server asks for more
LONGEST_WAIT = 600.0  # s that a server may ask for: beyond it the question is left for another day
MOST_IN_VAIN = 10  # questions in a row without an answer: the teacher is gone


@dataclass(frozen=True)
class Outcome:
    """What became of a question: its reply, or the reason why there is none."""

    task: Task
    reply: Reply | None
    reason: str = ""


class Generation:
    """One run over a list of questions. `stop` is looked at before every question and in every pause."""

    def __init__(
        self, teacher: Teacher, ledger: Ledger, budget: Budget, stop: StopSignal, *, first_pause: float = 1.0
    ) -> None:
        self.teacher = teacher
        self.ledger = ledger
        self.budget = budget
        self.stop = stop
        self.first_pause = first_pause
        self.ended_by = ""  # why questions are left: "" or a sentence
        self._error: BaseException | None = None
        self._in_vain = 0
        self._lock = threading.Lock()

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Ask; outcomes come as they are known. Raises TeacherError when the teacher cannot be used at all."""
        waiting = iter(tasks)
        outcomes: SimpleQueue[Outcome | None] = SimpleQueue()
        threads = min(self.teacher.at_once, len(tasks))
        for _ in range(threads):
            threading.Thread(target=self._work, args=(waiting, outcomes), daemon=True).start()
        while threads:
            outcome = outcomes.get()
            threads -= outcome is None
            if outcome is not None:
                yield outcome
        if self._error:
            raise self._error

    def _work(self, waiting: Iterator[Task], outcomes: "SimpleQueue[Outcome | None]") -> None:
        try:
            while (task := self._next(waiting)) is not None:
                outcome = self._answer(task)
                self._count(outcome)
                outcomes.put(outcome)
        except BaseException as error:  # carried to the thread that reads the outcomes
            self._error = self._error or error
        finally:
            outcomes.put(None)

    def _next(self, waiting: Iterator[Task]) -> Task | None:
        with self._lock:
            return None if self._is_over() else next(waiting, None)

    def _is_over(self) -> bool:
        if self.stop.asked and not self.ended_by:
            self.ended_by = "stopped"
        return bool(self.ended_by or self._error)

    def _answer(self, task: Task) -> Outcome:
        most = self.teacher.most(task)
        pause = self.first_pause
        reason = ""
        for attempt in range(ATTEMPTS):
            if self._is_over():
                return Outcome(task, None, reason or self.ended_by)
            if not self.budget.reserve(most):
                self.ended_by = "the budget is used up"
                return Outcome(task, None, self.ended_by)
            try:
                return Outcome(task, self._ask(task, most))
            except NoReply as error:
                reason = str(error)
                if not error.again or attempt == ATTEMPTS - 1 or (error.after or 0) > LONGEST_WAIT:
                    break
                self._pause(min(pause, LONGEST_PAUSE) * random.uniform(0.5, 1) if error.after is None else error.after)
                pause *= 2
        return Outcome(task, None, reason)

    def _ask(self, task: Task, most: Usage) -> Reply:
        """Ask once; what it cost is settled and written down, whatever happens."""
        used = most
        try:
            if most.tokens:
                self.ledger.write("asked", task.key, most)
            reply = self.teacher.ask(task)
            used = reply.usage
            if used.prompt > most.prompt or used.answer > most.answer:
                self.ended_by = "the teacher used more tokens than it was allowed, so no budget can be kept"
            provenance = {"teacher": self.teacher.name, "prompt": task.prompt, "context": task.context.digest}
            self.ledger.write("replied", task.key, used, text=reply.text, finish=reply.finish, **provenance)
            return reply
        except (NoReply, TeacherError) as error:
            used = most if isinstance(error, NoReply) and error.billed else Usage()
            self.ledger.write("failed", task.key, used, reason=str(error))
            raise
        finally:
            self.budget.settle(most, used)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._is_over():
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _count(self, outcome: Outcome) -> None:
        with self._lock:
            self._in_vain = 0 if outcome.reply else self._in_vain + 1
            if self._in_vain >= MOST_IN_VAIN and not self.ended_by:
                self.ended_by = f"{MOST_IN_VAIN} questions in a row got no answer ({outcome.reason})"
