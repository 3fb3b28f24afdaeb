"""Figures for Prometheus, of the answers as the log accounts for them, and of the engines at this moment."""

import logging
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llava_app.engine import Engine
from llava_app.errors import UserError

if TYPE_CHECKING:
    from prometheus_client import Metric

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 300)  # bounds of the buckets


def check_prometheus() -> None:
    """Raises UserError when its package is missing."""
    if find_spec("prometheus_client") is None:
        raise UserError(
            "--metrics needs the package prometheus_client. Install it (pip install prometheus_client) or leave "
            "--metrics out."
        )


class Metrics(logging.Handler):
    """Hears every `chat.Account`; `text` is what Prometheus reads."""

    def __init__(self, engines: Callable[[], dict[str, Engine]]) -> None:
        """`engines`: those that are loaded now, by the names of their models."""
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        super().__init__(logging.INFO)
        self._engines = engines
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(self)
        by_model = ["model"]
        self._answers = Counter("llava_answers", "How questions ended", [*by_model, "outcome"], registry=registry)
        self._tokens = Counter("llava_tokens", "Tokens that were written", by_model, registry=registry)
        self._first, self._whole = (
            Histogram(f"llava_{name}_seconds", f"To the {name}", by_model, buckets=SECONDS, registry=registry)
            for name in ("first_token", "end")
        )

    def emit(self, record: logging.LogRecord) -> None:
        account = getattr(record, "account", None)
        if account is None:
            return
        self._answers.labels(account.model, account.outcome).inc()
        self._tokens.labels(account.model).inc(account.tokens)
        self._whole.labels(account.model).observe(account.seconds)
        if account.seconds_to_first is not None:
            self._first.labels(account.model).observe(account.seconds_to_first)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def collect(self) -> "Iterator[Metric]":
        """The engines' own figures, which prometheus_client asks for with every reading."""
        from prometheus_client.core import GaugeMetricFamily

        snapshots = {name: engine.snapshot() for name, engine in self._engines().items()}
        for field in ("queued", "answering", "rows", "tokens_held", "cache_bytes"):
            gauge = GaugeMetricFamily(f"llava_{field}", "See llava_app/engine/watch.py", labels=["model"])
            for name, snapshot in snapshots.items():
                if snapshot:
                    gauge.add_metric([name], getattr(snapshot, field))
            yield gauge
