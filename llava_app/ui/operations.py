"""For whoever runs the page: whether it is well, figures, and an end that cuts nobody short."""

import ctypes
import logging
import platform
import signal
import time
from threading import Event

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_app.metrics import Metrics
from llava_app.ui.models import Models

LONGEST_END = 25.0  # s that answers may take to finish; Kubernetes kills after 30
M_MMAP_THRESHOLD = -3  # of glibc's mallopt(3)
LARGE = 256_000  # bytes; a picture
AFTERWARDS = 1.0  # s in which the browsers take what was said last

logger = logging.getLogger(__name__)


def routes(models: Models) -> list[Route]:
    """/healthz, which is 200 while questions can be answered and 503 otherwise, and /metrics."""
    metrics = Metrics(models.engines)
    logging.getLogger("llava_app.chat").addHandler(metrics)

    def health(request: Request) -> Response:
        state = models.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [Route("/healthz", health), Route("/metrics", figures)]


def give_back_pictures() -> None:
    """Let glibc return the room of a picture to the system as soon as it is freed.

    By itself it takes the first freed one as a sign that there will be more, and from then on keeps them, up to 64 MB
    in the heap of each thread.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def serve_until_told(page: gr.Blocks, models: Models) -> None:
    """Wait for Ctrl-C, which ends at once, or for SIGTERM, after which running answers are finished first."""
    told = Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        while not told.wait(0.5):  # s; on Windows Ctrl-C arrives only between two waits
            pass
        logger.info("Told to end; running answers may take %.0f s more.", LONGEST_END)
        models.close(LONGEST_END)
        time.sleep(AFTERWARDS)
    except KeyboardInterrupt:
        pass
    page.close(verbose=False)
