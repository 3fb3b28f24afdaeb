"""The figures of results/engine.json as a drawing: speed by how many people ask, waiting by turn."""

from collections.abc import Sequence
from pathlib import Path

Line = Sequence[tuple[int, float]]


def draw(file: Path, *, people: dict[str, Line], turns: dict[str, Line]) -> None:
    """For each side: `people`, (people, tokens per second), and `turns`, (turn, seconds to the first token)."""
    import matplotlib  # only a full run draws

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (speed, wait) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, lines in ((speed, people), (wait, turns)):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    speed.set(xlabel="people at once", ylabel="tokens/s, all together", title="Tokens per second")
    wait.set(xlabel="turn", ylabel="seconds", title="Time to first token")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
