"""Fifty visitors at the page: python -m tests.benchmarks.load [--quick] [--minutes 10] [--json].

The app runs in a process of its own; the visitors speak HTTP with it and read its streams of events. Each has a picture
that nobody else has, and compares every answer with the one that an engine gave to the same question before anybody
else was there. They ask short and long questions, press Stop, load the page anew in the middle of an answer, and send
files that are no pictures. A full run writes load.json to results/.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from finetune.evaluate.memeworld import as_upload, picture_of
from llava_app.checkpoints import read_card
from llava_app.engine.local import LocalEngine
from llava_app.images import Picture
from llava_app.loading import load
from llava_app.ui.page import MOST_TABS
from tests.benchmarks.engine import RESULTS, Row
from tests.benchmarks.page import write_endless_memeworld
from tests.benchmarks.tab import Page, Tab
from tests.benchmarks.visitors import Tally, Visitor, client, expect
from tests.serving import App, running

LARGE = 1024  # px; every fifth picture is as large as a photograph
SHOWN = 5  # of what went wrong
MB = 1e6


@dataclass(frozen=True)
class Effort:
    visitors: int
    seconds: float
    passers_by: int  # who open the page before them and leave
    timed: bool  # whether it is long enough to ask anything of time and memory


QUICK = Effort(12, 10, passers_by=0, timed=False)


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in bytes."""

    seconds: float  # since the first visitor came
    app: int
    models: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--quick", action="store_true", help="12 visitors for ten seconds, no file")
    parser.add_argument("--json", action="store_true", help="print the rows as a list on the last line")
    options = parser.parse_args()
    effort = QUICK if options.quick else Effort(options.visitors, options.minutes * 60, MOST_TABS, timed=True)
    tally, samples = measure(effort)
    rows = list(judge(tally, samples, effort))
    for row in rows:
        wanted = "" if row.at_least is None else f", at least {row.at_least:.3g}"
        print(f"{row.name}: {row.value:.4g} {row.unit} against {row.baseline:.4g}: {row.ratio:.3f}{wanted}")
    for problem in (tally.wrong + tally.faults)[:SHOWN]:
        print(f"  {problem}")
    if not options.quick:
        _write(rows, samples, effort)
    if options.json:
        print(json.dumps([{k: v for k, v in asdict(row).items() if k != "unit"} for row in rows]))
    sys.exit(any(row.ratio < row.at_least for row in rows if row.at_least is not None))


def measure(effort: Effort) -> tuple[Tally, list[Sample]]:
    """Let the visitors in, and watch the memory of the app until they have gone."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        write_endless_memeworld(runs / "endless")
        visitors = invited(runs / "endless", effort.visitors, tally)
        flags = ("--runs", str(runs), "--model", "endless", "--precision", "float32", "--metrics")
        with running(*flags, log=runs / "app.log") as app:
            samples = asyncio.run(_let_in(visitors, app, effort))
        log = (runs / "app.log").read_text(encoding="utf-8")
    tally.faults += [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    return tally, samples


def invited(model: Path, number: int, tally: Tally) -> list[Visitor]:
    """Visitors whose expected answers differ, so that one who gets another's notices."""
    engine = LocalEngine(load(read_card(model), "float32"))
    pictures = [_picture(index) for index in range(number)]
    expected = [expect(engine, picture) for picture in pictures]
    engine.close()
    assert len({one.description for one in expected}) == number, "two pictures have the same description"
    guests = zip(range(number), pictures, expected, strict=True)
    return [Visitor(index, picture, own, model=f"run/{model.name}", tally=tally) for index, picture, own in guests]


def _picture(index: int) -> Picture:
    picture = picture_of("heldout", index)
    return picture if index % 5 else as_upload(picture.image.resize((LARGE, LARGE)), picture.name)


async def _let_in(visitors: list[Visitor], app: App, effort: Effort) -> list[Sample]:
    async with client(app.address, len(visitors)) as first:
        while (await first.get("healthz")).status_code != httpx.codes.OK:  # the model is loading
            await asyncio.sleep(0.2)
        page = Page((await first.get("config")).json())
        for _ in range(effort.passers_by):
            await _pass_by(first, page)
    begun = time.monotonic()
    watching = asyncio.create_task(_watch(app, begun))
    await asyncio.gather(*(visitor.visit(app.address, page, begun + effort.seconds) for visitor in visitors))
    watching.cancel()
    return await watching


async def _pass_by(client: httpx.AsyncClient, page: Page) -> None:
    """Open the page and leave. The server remembers so many tabs, and its memory is to be full before it is weighed."""
    tab = Tab(client, page)
    await tab.run([page.restore], [{}])
    await tab.close()


async def _watch(app: App, begun: float) -> list[Sample]:
    """Until this is cancelled."""
    process, samples = psutil.Process(app.process.pid), []
    try:
        while True:
            models = sum(child.memory_info().rss for child in process.children(recursive=True))
            samples.append(Sample(time.monotonic() - begun, process.memory_info().rss, models))
            await asyncio.sleep(1)
    except asyncio.CancelledError:
        return samples


def judge(tally: Tally, samples: list[Sample], effort: Effort) -> Iterator[Row]:
    """What is asked of the page."""
    yield Row("answers as expected", tally.right, tally.asked, tally.right / tally.asked, 1, "answers")
    bad = len(tally.faults) + tally.provoked - tally.named
    yield Row("errors that had a name", tally.named, tally.named + bad, tally.named / (tally.named + bad), 1, "errors")
    p95, median = statistics.quantiles(tally.waits, n=20)[-1], statistics.median(tally.waits)
    yield Row("first word, 95th percentile against median", p95, median, median / p95, _if(effort.timed, 1 / 3), "s")
    for part in ("app", "models"):
        warm, end = (_level(samples, part, *span) for span in ((0.2, 0.3), (0.9, 1)))
        name = f"memory at the end against after warm-up, {part}"
        yield Row(name, end / MB, warm / MB, warm / end, _if(effort.timed, 1 / 1.1), "MB")
    pace = tally.asked / samples[-1].seconds * 60
    yield Row("answers a minute, all and each", pace, pace / effort.visitors, effort.visitors, None, "answers")


def _if(timed: bool, at_least: float) -> float | None:
    return at_least if timed else None


def _level(samples: list[Sample], part: str, begin: float, end: float) -> float:
    """The median between two parts of the time, 0 to 1."""
    last = samples[-1].seconds
    within = [getattr(sample, part) for sample in samples if begin * last <= sample.seconds <= end * last]
    return statistics.median(within)


def _write(rows: list[Row], samples: list[Sample], effort: Effort) -> None:
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    every = max(1, len(samples) // 40)
    memory = [[round(s.seconds), round(s.app / MB), round(s.models / MB)] for s in samples[::every]]
    written = {
        "measured_on": machine, "visitors": effort.visitors, "minutes": effort.seconds / 60,
        "rows": [asdict(row) for row in rows], "memory": memory,
    }  # fmt: skip
    (RESULTS / "load.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
