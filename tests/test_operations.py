"""For whoever runs the page: its health, its figures, its log, its end, and what a kill leaves behind."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llava_app.conversation import from_record
from llava_app.images import open_image
from llava_app.jobs import Jobs
from tests.benchmarks.page import write_endless_memeworld
from tests.benchmarks.tab import Heard, Page, Tab, greedy
from tests.loops import run
from tests.serving import PATIENCE, ROOT, App, running

MEME = ROOT / "examples" / "memes" / "big-dog.png"
SECRET = "Is the swordfish in the picture?"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    write_endless_memeworld(runs / "endless")
    return runs


@pytest.fixture
def app(runs: Path) -> Iterator[App]:
    with running("--runs", str(runs), "--model", "endless", "--metrics", "--log-json", log=runs / "app.log") as app:
        yield app


@pytest.fixture
def jobs(runs: Path) -> Iterator[Jobs]:
    """The jobs of the app; afterwards none of them runs."""
    jobs = Jobs(runs)
    yield jobs
    deadline = time.monotonic() + PATIENCE
    for job in jobs.all():
        job.stop()
        while job.is_alive:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    jobs.all()  # lets go of them


async def ask(tab: Tab, question: str, tokens: int, **how: Any) -> Heard:
    picture = await tab.upload(MEME.read_bytes(), "meme.png")
    box = {"text": question, "files": [picture]}
    return await tab.run(tab.page.ask, [box, None, None, "run/endless", *greedy(tokens)], **how)


async def vote_on_and_on(tab: Tab) -> None:
    """Like and dislike an answer until nobody takes it any more."""
    heard, vote = Heard(), 0
    while not heard.faults:
        about = {"turn": 0, "vote": ("up", "down")[vote % 2]}
        heard = await tab.run([tab.page.like], [None, "run/endless"], about=about)
        vote += 1


def kept(heard: Heard) -> dict[str, Any]:
    """The last turn, as the browser is told to store it."""
    turn: dict[str, Any] = heard.outputs[-1]["kept"]["turns"][-1]
    return turn


async def until_ready(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while (health := await client.get("healthz")).status_code != httpx.codes.OK:
        assert health.json() == {"status": "loading"}
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def test_health_figures_log_and_an_end_that_cuts_nobody_short(app: App, runs: Path) -> None:
    async def visit() -> tuple[Heard, Heard, str, httpx.Response]:
        async with httpx.AsyncClient(base_url=app.address, timeout=PATIENCE) as client:
            await until_ready(client)
            page = Page((await client.get("config")).json())
            tab, late = Tab(client, page), Tab(client, page)
            await ask(tab, SECRET, 8)
            figures = (await client.get("metrics")).text
            begun = asyncio.Event()
            long = asyncio.create_task(ask(tab, SECRET, 400, look=lambda outputs: begun.set()))
            await begun.wait()
            app.process.send_signal(signal.SIGTERM)
            while (health := await client.get("healthz")).status_code == httpx.codes.OK:
                await asyncio.sleep(0.05)
            refused = await ask(late, "And I?", 8)
            return await long, refused, figures, health

    finished, refused, figures, health = run(visit())
    assert health.json() == {"status": "closing"}
    assert (kept(finished)["finish"], finished.faults) == ("length", [])
    assert refused.told == ["The app is about to start anew. Send the question again in a minute."]
    assert app.process.wait(PATIENCE) == 0
    assert 'llava_answers_total{model="endless",outcome="length"} 1.0' in figures
    assert 'llava_rows{model="endless"}' in figures
    log = (runs / "app.log").read_text(encoding="utf-8")
    accounts = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    answered = [account for account in accounts if account["message"] == "Question answered"]
    assert [(account["tokens"], account["pictures"], account["outcome"]) for account in answered] == [
        (8, 1, "length"),
        (400, 2, "length"),
    ]
    assert len({account["request"] for account in answered}) == 2
    assert "swordfish" not in log
    assert "BIG DOG" not in log  # what the model reads in it
    assert list((runs / "llava-uploads").iterdir()) == []


def test_a_killed_app_leaves_everything_in_order(app: App, runs: Path, jobs: Jobs, tmp_path: Path) -> None:
    command = ("memeworld", "data", f"--folder={tmp_path}", "--pictures=1000000")  # runs until it is stopped

    async def visit() -> None:
        async with httpx.AsyncClient(base_url=app.address, timeout=PATIENCE) as client:
            page = Page((await client.get("config")).json())
            tabs = [Tab(client, page) for _ in range(4)]
            await asyncio.gather(*(ask(tab, "What is the joke?", 8) for tab in tabs))
            voting = [asyncio.create_task(vote_on_and_on(tab)) for tab in tabs]
            while not (runs / "feedback" / "disliked.jsonl").exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            app.process.kill()
            await asyncio.gather(*voting)

    jobs.start("mine", "instruct", (command,))
    run(visit())
    app.process.wait(PATIENCE)
    records = [line for file in (runs / "feedback").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(records) >= 4
    for record in map(json.loads, records):
        picture = open_image(runs / "feedback" / record["image"])
        assert from_record(record, [picture]).turns[0].question == "What is the joke?"
    (left,) = (runs / "llava-uploads").glob("page-*/")
    assert list(left.rglob("meme.png"))
    with running("--runs", str(runs), "--model", "endless", log=runs / "again.log") as again:
        assert [(found.name, found.state) for found in Jobs(runs).all()] == [("mine", "running")]
        assert not left.exists()
        assert httpx.get(again.address).status_code == httpx.codes.OK
