"""What the process of the page keeps of its visitors, and for how long. In a process of its own: Gradio leaves an event
loop open for each page, and how glibc hands out memory is set for all of a process."""

import json
import platform
import subprocess
import sys
from typing import Any

import pytest

from llava_app.ui.calls import LOST, MOST_LEFT
from tests.serving import PATIENCE, ROOT

SCRIPT = """
import asyncio, ctypes, json
from datetime import timedelta
from types import SimpleNamespace
import gradio as gr
from fastapi import HTTPException
from llava_app.ui.calls import MOST_LEFT, Page
from llava_app.ui.operations import give_back_pictures

def large_bytes():
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    info = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = info
    return ask().hblkhd

with Page() as page:
    window = gr.Textbox()
    window.change(lambda text: None, window, None)
    gr.Timer().tick(lambda text: None, window, None)
told, tabs, queue = {}, page.state_holder, page._queue

asyncio.run(page.preprocess_data(page.fns[0], ["x" * 1_000_000], tabs["0"]))
told["values"] = len(tabs["0"].config_values)
told["input"] = asyncio.run(page.preprocess_data(page.fns[0], ["as it was"], tabs["0"]))

for number in range(MOST_LEFT + 20):
    tabs[str(number)]
    page.left(SimpleNamespace(session_hash=str(number)))
    if number == 7:
        tabs.time_last_used["7"] += timedelta(minutes=1)  # its connection had only broken
told["tabs"] = list(tabs.session_data)

page._tabs.lose("lost", tabs)
page._admit(page.fns[1], "lost", "me")  # the clock
try:
    page._admit(page.fns[0], "lost", "me")
except HTTPException as refused:
    told["lost"] = [refused.status_code, refused.detail]

tabs["open"]
call = {"block_fn": page.fns[0], "inputs": ["x"], "state": tabs["call"], "session_hash": "call", "event_id": "call"}
asyncio.run(page.process_api(**call))
told["first to go"] = next(iter(tabs.session_data))

for number in range(9):
    queue.event_analytics[number] = {"function": "ask", "status": "success", "process_time": 1.0}
queue.events_recorded = 9
told["statistics"] = [queue.compute_analytics_summary(list(queue.event_analytics.values())), queue.ANALYTICS_MAX_EVENTS]

try:
    give_back_pictures()
    before = large_bytes()
    for _ in range(3):
        picture = bytes(12_000_000)
        told["picture"] = large_bytes() - before
        del picture
    told["afterwards"] = large_bytes() - before
except (AttributeError, TypeError):  # another C library
    pass
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE)
    return json.loads(run.stdout)


def test_no_copy_of_what_a_tab_shows_is_kept(told: dict[str, Any]) -> None:
    assert (told["values"], told["input"]) == (0, ["as it was"])


def test_what_was_in_the_last_closed_tabs_is_kept_and_in_one_that_came_back(told: dict[str, Any]) -> None:
    assert told["tabs"] == ["7", *map(str, range(20, MOST_LEFT + 20))]


def test_a_tab_that_is_lost_is_told_when_a_person_does_something_there(told: dict[str, Any]) -> None:
    assert told["lost"] == [409, LOST]


def test_a_call_without_a_session_takes_no_tabs_room(told: dict[str, Any]) -> None:
    assert told["first to go"] == "call"


def test_no_statistics_are_made_after_each_event(told: dict[str, Any]) -> None:
    assert told["statistics"] == [{"functions": {}}, 1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing back")
def test_the_room_of_a_picture_is_given_back_each_time(told: dict[str, Any]) -> None:
    assert told["picture"] >= 12_000_000
    assert told["afterwards"] == 0
