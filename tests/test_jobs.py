import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from PIL import Image

from llava_app.checkpoints import LOCK_NAME, read_card
from llava_app.commands import without_folders
from llava_app.errors import TrainingError
from llava_app.jobs import Job, Jobs, ask
from tests.fixtures_model import write_tiny_model

PATIENCE = 240  # s, for a machine that is busy with other things


def until(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        alive = job.is_alive and time.monotonic() < deadline
        assert alive or condition(), job.log.read_text(encoding="utf-8")
        time.sleep(0.1)


def drawing(folder: Path) -> tuple[str, ...]:
    """A command that runs until it is stopped, and needs no torch."""
    return ("memeworld", "data", f"--folder={folder}", "--pictures=1000000")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs of an empty folder; afterwards none of them runs."""
    jobs = Jobs(tmp_path / "runs")
    yield jobs
    for job in jobs.all():
        job.stop()
        until(lambda job=job: not job.is_alive, job)
    jobs.all()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty records, each with a picture of its own colour."""
    folder = tmp_path_factory.mktemp("records")
    told = []
    for number in range(40):
        Image.new("RGB", (28, 28), (6 * number, 100, 200)).save(folder / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhich shade?"}, {"from": "gpt", "value": f"It is {number}."}]
        told.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (folder / "records.json").write_text(json.dumps(told), encoding="utf-8")
    return folder / "records.json"


def test_a_run_is_stopped_found_by_another_page_and_goes_on(jobs: Jobs, records: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base")
    where = (f"--base={tmp_path / 'base'}", f"--data={records}", f"--runs={jobs.runs}")
    how = ("global_batch=8", "micro_batch=8", "epochs=1000", "save_every=2", "max_steps=100000")
    job = jobs.start("mine", "instruct", (("instruct", "--name=mine", *where, *how),))
    until(lambda: (job.folder / "log.jsonl").exists() and len(_steps(job)) > 2, job)
    assert job.state == "running"

    later = Jobs(jobs.runs)
    (found,) = later.all()
    found.stop()
    until(lambda: not found.is_alive, found)
    assert (found.state, found.exit_code) == ("stopped", 130)
    stopped_after = _steps(job)[-1]

    recipe = job.folder / "recipe.yaml"  # a shorter run, so that its end is seen
    recipe.write_text(recipe.read_text().replace("max_steps: 100000", f"max_steps: {stopped_after + 2}"))
    later.resume("mine")
    until(lambda: not found.is_alive, found)
    assert found.state == "finished", found.log.read_text(encoding="utf-8")
    assert _steps(job) == list(range(1, stopped_after + 3))
    assert not [name for name in read_card(job.folder).files if name.startswith("job/")]
    later.all()
    with pytest.raises(TrainingError, match="mine is finished"):
        later.resume("mine")
    with pytest.raises(TrainingError, match="a run mine already"):
        later.start("mine", "instruct", ())


def test_jobs_run_one_after_the_other_in_the_order_they_were_ordered(jobs: Jobs, tmp_path: Path) -> None:
    first = jobs.start("first", "align", (drawing(tmp_path),))
    second = jobs.start("second", "align", (("recipes",), ("recipes", "memeworld_align")))
    third = jobs.start("third", "align", (("recipes",),))
    assert [job.name for job in jobs.all()] == ["third", "second", "first"]
    until(lambda: "$ python" in first.log.read_text(), first)
    until(lambda: "Waiting for second" in third.log.read_text(), third)
    assert [first.state, second.state, third.state] == ["running", "queued", "queued"]

    third.stop()
    until(lambda: not third.is_alive, third)
    assert third.state == "stopped"
    assert "$ python" not in third.log.read_text()
    assert second.state == "queued"

    first.stop()
    until(lambda: not second.is_alive, second)
    assert first.state == "stopped"
    assert second.exit_code == 0
    assert second.log.read_text().count("$ python -m finetune recipes") == 2

    jobs.resume("third")
    until(lambda: not third.is_alive, third)
    assert third.exit_code == 0


def test_a_killed_job_is_stopped_and_says_no_code(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.start("killed", "align", (drawing(tmp_path),))
    until(lambda: "$ python" in job.log.read_text(), job)
    assert len(job.processes()) > 1  # its command too
    for process in job.processes():
        process.kill()
    until(lambda: not job.is_alive, job)
    assert (job.state, job.exit_code) == ("stopped", None)


def test_a_command_whose_own_process_was_killed_still_counts(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.start("orphan", "align", (drawing(tmp_path),))
    until(lambda: (job.folder / "job" / "command.json").exists(), job)
    first, command, *_ = job.processes()
    first.kill()
    first.wait()
    jobs.all()
    assert (job.state, job.processes()[0]) == ("running", command)
    with pytest.raises(TrainingError, match="orphan is running"):
        jobs.resume("orphan")
    job.stop()
    until(lambda: not job.is_alive, job)
    assert job.state == "stopped"


def test_a_run_that_another_process_trains_does_not_go_on_beside_it(jobs: Jobs) -> None:
    job = jobs.start("taken", "align", (("recipes", "no_such_recipe"),))
    until(lambda: not job.is_alive, job)
    with FileLock(job.folder / LOCK_NAME), pytest.raises(TrainingError, match="taken is being trained by a process"):
        jobs.resume("taken")
    jobs.resume("taken")
    until(lambda: not job.is_alive, job)


def test_a_job_that_fails_says_so_and_its_next_command_does_not_run(jobs: Jobs) -> None:
    job = jobs.start("wrong", "align", (("recipes", "no_such_recipe"), ("recipes",)))
    until(lambda: not job.is_alive, job)
    assert (job.state, job.exit_code) == ("failed", 2)
    assert "There is no recipe 'no_such_recipe'" in job.log.read_text()
    assert job.log.read_text().count("$ python") == 1


def test_another_process_with_the_same_id_is_not_the_job(jobs: Jobs) -> None:
    job = jobs.start("old", "align", (("recipes",),))
    until(lambda: not job.is_alive, job)
    me = psutil.Process()
    path = job.folder / "job" / "process.json"
    path.write_text(json.dumps({"pid": me.pid, "began": me.create_time()}))
    assert job.is_alive
    path.write_text(json.dumps({"pid": me.pid, "began": me.create_time() - 3600}))
    assert not job.is_alive


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-rf", "two words"])
def test_a_name_that_is_no_folder_name_is_refused(jobs: Jobs, name: str) -> None:
    with pytest.raises(TrainingError, match="is no folder name"):
        jobs.start(name, "align", ())
    assert not jobs.all()


def test_what_was_asked_is_answered_and_closing_ends_it(tmp_path: Path) -> None:
    *_, told = ask(("recipes", "memeworld_align"))
    assert told
    assert "learning_rate" in told
    with pytest.raises(TrainingError, match="There is no recipe 'nothing_like_it'"):
        list(ask(("recipes", "nothing_like_it")))
    asked = ask(drawing(tmp_path / "drawn"))
    assert next(asked) is None
    asked.close()
    assert not [child for child in psutil.Process().children() if str(tmp_path / "drawn") in child.cmdline()]


def test_of_paths_only_the_last_name_is_told() -> None:
    assert without_folders("in /home/me/data/a.json: 3/4 of it, http://x") == "in a.json: 3/4 of it, http://x"


def _steps(job: Job) -> list[int]:
    lines = (job.folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and '"loss"' in line]
