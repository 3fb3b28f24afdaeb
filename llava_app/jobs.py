"""Training runs as processes of their own: ordered, watched, stopped and resumed through files.

runs/NAME/job/order.json     what it runs, and when it was ordered
runs/NAME/job/process.json   its process: the id, and when that began, since an id is used again
runs/NAME/job/command.json   the same of the command that it runs, which outlives it when it alone is killed
runs/NAME/job/exit.json      how it ended
runs/NAME/job/log.txt        what it printed

`python -m llava_app.jobs FOLDER` is that process. It waits for the jobs ordered before it, then runs its commands one
after the other. It outlives the page that started it, and a page that starts later finds it by these files.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil
from filelock import FileLock, Timeout

from llava_app.checkpoints import CARD_NAME, LOCK_NAME
from llava_app.commands import ROOT, told, without_folders
from llava_app.errors import TrainingError

LOOK = 0.5  # s between two looks at the jobs ahead
SAME_START = 10.0  # s; psutil reckons a start from the system's clock, which may be set
INTERRUPTED = 130  # what finetune returns after SIGTERM, its state saved
STOPPED = (INTERRUPTED, -signal.SIGTERM)
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TQDM_MININTERVAL": "2"}

Command = tuple[str, ...]  # the arguments of `python -m finetune`


@dataclass(frozen=True)
class Order:
    """What a job runs, and when it was ordered, in ns since 1970: the queue is in this order."""

    stage: str
    commands: tuple[Command, ...]
    ordered: int


class Job:
    """The job of one run, as the files in its folder tell it."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.folder = folder

    @property
    def order(self) -> Order:
        """Raises TrainingError when the page never ordered this run."""
        stored = _read(self.folder / "job" / "order.json")
        if not stored:
            raise TrainingError(f"The page started no run {self.name!r:.60}. Choose one of the list.")
        return Order(stored["stage"], tuple(map(tuple, stored["commands"])), stored["ordered"])

    @property
    def log(self) -> Path:
        return self.folder / "job" / "log.txt"

    @property
    def is_alive(self) -> bool:
        """Whether its process or its command runs; another one that has its id by now is not it."""
        return bool(self._running())

    @property
    def exit_code(self) -> int | None:
        """None before the end, and for ever when it was killed or the machine went down."""
        return _read(self.folder / "job" / "exit.json").get("code")

    @property
    def state(self) -> str:
        """One of queued, running, finished, stopped, failed."""
        if self.is_alive:
            return "queued" if ahead(self) else "running"
        if (self.folder / CARD_NAME).exists():
            return "finished"
        return "stopped" if self.exit_code is None or self.exit_code in STOPPED else "failed"

    def stop(self) -> None:
        """Ask its processes to end: they save first, but on Windows, where none can be asked. Returns at once."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def processes(self) -> list[psutil.Process]:
        """Its process and those that it started; none when it has ended."""
        found: dict[psutil.Process, None] = {}
        for process in self._running():
            with suppress(psutil.NoSuchProcess):
                found |= dict.fromkeys([process, *process.children(recursive=True)])
        return list(found)

    def _running(self) -> list[psutil.Process]:
        """Its process and its command, those of them that run."""
        stored = [_read(self.folder / "job" / name) for name in ("process.json", "command.json")]
        return [process for process in map(_process, stored) if process]


class Jobs:
    """The jobs of one folder of runs."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs.absolute()
        self._children: list[subprocess.Popen[bytes]] = []

    def all(self) -> list[Job]:
        """Every job, the one ordered last first."""
        for child in self._children:
            child.poll()  # one that ended is let go
        return list(reversed(_in_order(self.runs)))

    def job(self, name: str) -> Job:
        """Raises TrainingError when `name` is no folder name."""
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise TrainingError(f"The name {name!r:.60} is no folder name. Give letters, digits, dots, dashes.")
        return Job(self.runs / name)

    def start(self, name: str, stage: str, commands: tuple[Command, ...]) -> Job:
        """Order a new run. It begins when the jobs before it have ended. Raises TrainingError for a taken name."""
        job = self.job(name)
        taken = job.is_alive or any((job.folder / file).exists() for file in (CARD_NAME, "run.yaml"))
        if taken:
            raise TrainingError(f"There is a run {name} already. Give the new one another name.")
        return self._start(job, Order(stage, commands, time.time_ns()))

    def resume(self, name: str) -> Job:
        """Go on where a stopped run was left; one that had not begun yet begins. Raises TrainingError."""
        job = self.job(name)
        order = job.order
        if job.state not in ("stopped", "failed"):
            raise TrainingError(f"The run {name} is {job.state}; only one that was stopped can go on.")
        if _is_trained(job.folder):
            raise TrainingError(
                f"{name} is being trained by a process that the page did not start. Stop that one, or wait for its end."
            )
        commands = order.commands
        if (job.folder / "run.yaml").exists():
            commands = ((order.stage, f"--name={name}", f"--runs={short(self.runs)}", "--resume"),)
        return self._start(job, Order(order.stage, commands, time.time_ns()))

    def _start(self, job: Job, order: Order) -> Job:
        self._children = [child for child in self._children if child.poll() is None]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        (job.folder / "job" / "exit.json").unlink(missing_ok=True)
        _write(job.folder / "job" / "order.json", asdict(order))
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "llava_app.jobs", str(job.folder)],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(process)
        _note(job.folder / "job" / "process.json", process.pid)
        return job


def ask(command: Command) -> Iterator[str | None]:
    """Run a command that answers soon: None while it works, at the end what it printed. Closing this ends it.

    Raises TrainingError with what it complained of.
    """
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(
            told(command), cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=printed, stderr=complained
        )
        try:
            while process.poll() is None:
                yield None
                time.sleep(LOOK / 2)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise TrainingError(without_folders(_all(complained).strip().rpartition("\n")[2]))
        yield _all(printed)


def ahead(job: Job) -> list[Job]:
    """The jobs that run, or wait, before this one."""
    ordered = job.order.ordered
    return [other for other in _in_order(job.folder.parent) if other.order.ordered < ordered and other.is_alive]


def short(path: Path) -> str:
    """A path for the command line, which runs in ROOT."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _all(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _in_order(runs: Path) -> list[Job]:
    jobs = [Job(path.parents[1]) for path in runs.glob("*/job/order.json")]
    return sorted(jobs, key=lambda job: job.order.ordered)


def _is_trained(folder: Path) -> bool:
    """Whether any process trains the run in `folder`."""
    if not (folder / LOCK_NAME).exists():
        return False
    try:
        with FileLock(folder / LOCK_NAME, timeout=0):
            return False
    except Timeout:
        return True


def _note(path: Path, pid: int) -> None:
    """Write down a process that was just started."""
    _write(path, {"pid": pid, "began": psutil.Process(pid).create_time()})


def _process(stored: dict[str, Any]) -> psutil.Process | None:
    """The process that was noted, if it runs."""
    try:
        process = psutil.Process(stored["pid"])
        runs = process.status() != psutil.STATUS_ZOMBIE and _same(process.create_time(), stored["began"])
    except (KeyError, psutil.Error):
        return None
    return process if runs else None


def _same(began: float, stored: float) -> bool:
    return abs(began - stored) < SAME_START


def _read(path: Path) -> dict[str, Any]:
    """Empty when there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, stored: dict[str, Any]) -> None:
    """By rename: a reader finds all of it or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stored), encoding="utf-8")
    partial.replace(path)


def run(job: Job) -> int:
    """Wait for the jobs ahead, then run the commands until one fails; returns the exit code of the last one.

    SIGTERM reaches the command too, which saves and ends; this process stays to write down how.
    """
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    code = 0
    if before := ahead(job):
        print(f"Waiting for {before[-1].name} …", flush=True)
    while not signals and ahead(job):
        time.sleep(LOOK)
    for command in job.order.commands:
        if code or signals:
            break
        print(f"$ python -m finetune {shlex.join(command)}", flush=True)
        process = subprocess.Popen(told(command))
        _note(job.folder / "job" / "command.json", process.pid)
        code = process.wait()
    code = code or (INTERRUPTED if signals and not (job.folder / CARD_NAME).exists() else 0)
    _write(job.folder / "job" / "exit.json", {"code": code})
    return code


if __name__ == "__main__":
    sys.exit(run(Job(Path(sys.argv[1]))))
