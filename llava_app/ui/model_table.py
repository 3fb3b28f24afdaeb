"""What the page says of models beyond their cards: what they would take here, how they scored, how loading goes."""

import html
from collections.abc import Mapping
from pathlib import Path

from llava_app import hub
from llava_app.checkpoints import HUB_PRESETS, Card, Outlook
from llava_app.evaluations import read_scores
from llava_app.presets import PRESETS
from llava_app.ui.display import KINDS, TRAINED

COMPLETE = 0.97  # of a download's expected size, which is that of the weights alone
FAMILIES = {"llava": "LLaVA-1.5", "llava_next": "LLaVA-1.6, tiles", "llava_onevision": "OneVision, tiles and clips"}
PRECISIONS = {"4bit": "4 bit", "8bit": "8 bit"}
HEAD = ("Model", "Family", "Size", "Context", "Needs here", "Scores", "")


def getting(card: Card) -> str:
    """What loading a model is at: the download or the weights."""
    if card in HUB_PRESETS:
        whole = next(2 * preset.parameters for preset in PRESETS if preset.source == card.source)
        fetched = hub.fetched(card)
        if fetched < COMPLETE * whole:
            return f"Downloading {card.name}: {fetched / 1e9:.1f} of {whole / 1e9:.1f} GB …"
    return f"Loading {card.name} …"


def figures(card: Card, expected: Outlook | None) -> list[tuple[str, str]]:
    """What a model is and takes in numbers, as names and values."""
    scored = " · ".join(scores(card))
    sizes = [] if expected is None else [
        ("Size", f"{_count(expected.parameters)} parameters, {FAMILIES[expected.family]}"),
        ("Context", f"{expected.context:,} tokens"),
        ("Needs here", needs(expected)),
    ]  # fmt: skip
    return [*sizes, *([("Scores", scored)] if scored else [])]


def needs(expected: Outlook) -> str:
    """Against what is free."""
    precision = PRECISIONS.get(expected.precision, expected.precision)
    fetched = f", {_bytes(expected.download)} to download" if expected.download else ""
    return f"{_bytes(expected.needed)} of {_bytes(expected.free)} free, in {precision}{fetched}"


def scores(card: Card) -> list[str]:
    """What evaluations have left beside the model."""
    found = read_scores(Path(card.source))
    return [f"{score.suite} {score.value:.1f} % ({score.count:,} questions)" for score in found]


def table(cards: Mapping[str, Card], outlooks: Mapping[Card, Outlook]) -> str:
    """The dialogue that lists every model by its key, each with a button that chooses it where it fits."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in HEAD)
    rows = "".join(_row(key, card, outlooks.get(card)) for key, card in cards.items())
    return (
        "<dialog class='sheet wide' aria-label='All models'><h2>All models</h2>"
        f"<div class='models'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<menu><button data-do='close'>Close</button></menu></dialog>"
    )


def _row(key: str, card: Card, expected: Outlook | None) -> str:
    told = ("", "", "", "") if expected is None else (
        FAMILIES[expected.family],
        _count(expected.parameters),
        f"{expected.context:,}",
        needs(expected),
    )  # fmt: skip
    fits = expected is None or expected.refusal is None
    named = f"data-do='use' data-model='{html.escape(key)}' aria-label='Use {html.escape(card.name)}'"
    about = f"{KINDS[card.kind]} · trained: {TRAINED[card.stage]}"
    name = f"<th scope='row'>{html.escape(card.name)}<small>{html.escape(about)}</small></th>"
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in (*told, " · ".join(scores(card))))
    use = f"<button {named}>Use</button>" if fits else "does not fit"
    return f"<tr class='{'' if fits else 'no'}'>{name}{cells}<td>{use}</td></tr>"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
