"""The list of models: what each takes here, how it scored, how a download goes, and the one that is chosen."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llava_app import hub
from llava_app.checkpoints import HUB_PRESETS, Card, Outlook, built_in
from llava_app.engine.process import ModelProcess
from llava_app.evaluations import Score, read_scores
from llava_app.ui.model_table import getting, needs, table
from llava_app.ui.models import Models, Ready
from llava_app.ui.picker import Picker

BIG = next(card for card in HUB_PRESETS if card.name == "LLaVA-1.5-7B")
FITS = Outlook("llava", 7_063_427_072, 4096, "4bit", 5.5e9, 8e9, 14.1e9, None)
TOO_BIG = Outlook("llava", 7_063_427_072, 4096, "bfloat16", 16e9, 8e9, 0, "LLaVA-1.5-7B needs 16.0 GB. Choose another.")


@pytest.fixture
def downloading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of BIG arrive."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "blobs"
    blobs.mkdir(parents=True)
    return blobs


def put(blobs: Path, name: str, size: float) -> None:
    """A file of this size that takes no room."""
    with (blobs / name).open("wb") as file:
        file.truncate(int(size))


def test_a_download_says_how_far_it_is(downloading: Path) -> None:
    assert getting(BIG) == "Downloading LLaVA-1.5-7B: 0.0 of 14.1 GB …"
    put(downloading, "one", 4.9e9)
    put(downloading, "two.incomplete", 0.3e9)
    assert getting(BIG) == "Downloading LLaVA-1.5-7B: 5.2 of 14.1 GB …"
    put(downloading, "two", 9.2e9)
    assert getting(BIG) == "Loading LLaVA-1.5-7B …"
    assert getting(built_in()) == "Loading memeworld …"


def test_what_a_model_needs_stands_against_what_is_free() -> None:
    assert needs(FITS) == "5.5 GB of 8.0 GB free, in 4 bit, 14.1 GB to download"
    assert needs(TOO_BIG) == "16.0 GB of 8.0 GB free, in bfloat16"


def test_scores_lie_beside_the_model_and_what_is_no_score_is_passed_over(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == []
    stored = {"memeworld": {"score": 84.25, "count": 1000}, "vibes": {"score": None, "count": 0}}
    (tmp_path / "scores.json").write_text(json.dumps(stored), encoding="utf-8")
    assert read_scores(tmp_path) == [Score("memeworld", 84.25, 1000)]
    for broken in ("[]", "{", '{"a": 1}', '{"a": {"count": 1}}'):
        (tmp_path / "scores.json").write_text(broken, encoding="utf-8")
        assert read_scores(tmp_path) == []


def test_every_model_is_listed_and_what_does_not_fit_cannot_be_used() -> None:
    odd = Card("<b>", "far/away", "server", "instruct", "vicuna_v1", "pad")
    shown = table({"hub/big": BIG, "odd": odd}, {BIG: FITS})
    assert "7.1 B" in shown
    assert "&lt;b&gt;" in shown
    assert shown.count("data-do='use'") == 2
    refused = table({"hub/big": BIG}, {BIG: TOO_BIG})
    assert "does not fit" in refused
    assert "data-do='use'" not in refused


class Waiting(Models):
    """Loads when it is told to."""

    opening: Future[Ready]

    @contextmanager
    def lend(self, card: Card) -> Iterator[Future[Ready]]:
        yield self.opening


def test_the_chosen_model_says_what_it_takes_and_how_it_scored(tmp_path: Path) -> None:
    shutil.copytree(built_in().source, tmp_path / "mine")
    (tmp_path / "mine" / "scores.json").write_text('{"memeworld": {"score": 84.25, "count": 1000}}', encoding="utf-8")
    process = ModelProcess()
    models = Waiting(
        lambda card: Ready(None, ""),
        lambda: (built_in(), ""),
        runs=tmp_path,
        weigh=lambda cards: process.weigh(cards, "float32"),
    )
    models.opening = Future()
    told = Picker(models).choose("run/mine")
    assert "Loading memeworld …" in next(told)
    models.opening.set_result(Ready(None, "It runs."))
    shown = list(told)[-1]
    assert "<dt>Needs here</dt><dd>" in shown
    assert " free, in float32</dd>" in shown
    assert "<dt>Context</dt><dd>1,024 tokens</dd>" in shown
    assert "memeworld 84.2 % (1,000 questions)" in shown
    listed = Picker(models).table()
    assert listed.count("<tr") == 1 + len(models.cards())
    assert listed.count("in float32") == len(models.cards())


@pytest.mark.parametrize("forged", [{}, {"model": "nobody"}, {"model": None}, {"model": 3}])
def test_only_a_model_of_the_list_can_be_chosen_in_the_table(tmp_path: Path, forged: dict[str, Any]) -> None:
    picker = Picker(Models(lambda card: Ready(None, ""), lambda: (built_in(), ""), runs=tmp_path))
    assert picker.use(SimpleNamespace(_data={"model": "built-in/memeworld"}))["value"] == "built-in/memeworld"
    assert "value" not in picker.use(SimpleNamespace(_data=forged))


def test_a_model_stays_chosen_while_its_server_is_away_and_says_so(tmp_path: Path) -> None:
    here, far = {"twin"}, Card("twin", "twin", "server", "instruct", "", "", about="Runs on a server.")
    models = Models(
        lambda card: Ready(None, "It runs."),
        lambda: (far, ""),
        runs=tmp_path,
        elsewhere=lambda: [far],
        reaches=lambda card: card.source in here,
    )
    models.start()
    picker = Picker(models)
    assert models.first.result(30) == "twin"
    assert "status ready" in list(picker.choose("twin"))[-1]
    listed, _, line = picker.refresh([], "twin")
    assert ("twin · on a server", "twin") in listed
    assert (models.state, "Runs on a server." in line) == ("ready", True)
    here.clear()
    away, update, line = picker.refresh(listed, "twin")
    assert ("twin · on a server that cannot be reached", "twin") in away
    assert "value" not in update
    assert "The server of twin cannot be reached." in line
    assert "status failed" in list(picker.choose("twin"))[-1]
    assert models.state == "failed"
    here.add("twin")
    assert "status ready" in picker.refresh(away, "twin")[2]


def test_the_model_to_start_with_keeps_its_key_when_its_server_offers_another(tmp_path: Path) -> None:
    far = Card("fake", "org/fake", "server", "instruct", "", "")
    offered = [far]
    models = Models(lambda card: Ready(None, ""), lambda: (far, ""), runs=tmp_path, elsewhere=lambda: list(offered))
    models.start()
    assert models.first.result(30) == "org/fake"
    offered.clear()
    assert models.card("org/fake") == far
