import json
from pathlib import Path

import pytest

from llava_app.__main__ import main
from llava_app.checkpoints import Card, built_in
from llava_app.lens import CONTEXTS, economy, families, memory, shares
from llava_app.presets import PRESETS
from llava_app.ui.lens import parts_table, share_chart
from llava_app.ui.models import Models


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["lens", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_object_per_size_with_tokens_tiles_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    wide, square = lines(capsys, "--family", "llava-1.6", "--size", "1344x672", "672x672")
    assert (wide["visual_tokens"], wide["tiles"]) == (1752, 3)
    assert (square["visual_tokens"], square["tiles"]) == (2928, 5)
    assert wide["share"] == {"2048": 0.8555, "4096": 0.4277, "32768": 0.0535, "131072": 0.0134}


def test_every_family_is_shown_unless_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["family"] for row in lines(capsys, "--size", "9x9")] == families()
    assert {row.visual_tokens for row in shares("llava-1.5", [(1, 1), (2000, 3)])} == {576}


@pytest.mark.parametrize("size", ["0x10", "12", "1x1x1", "-3x4", "9999999x1"])
def test_a_wrong_size_is_named(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["lens", f"--size={size}"]) == 2
    assert f"{size} is no size" in capsys.readouterr().err


def test_the_table_has_a_line_per_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "--family", "llava-1.6", "--size", "1344x672"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "1752 tokens" in line
    assert "4k  42.8%" in line


def test_the_parts_of_seven_billion_are_those_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {row.part: row for row in economy("LLaVA-1.5-7B")}
    assert parts["vision tower"].parameters == 303_507_456
    assert parts["projector"].parameters == 20_979_712
    assert sum(row.parameters for row in parts.values()) == 7_063_427_072
    assert lines(capsys, "--model", "LLaVA-1.5-7B")[1]["trained"] == {"align": True, "instruct": True}


def test_the_parts_of_a_folder_are_counted_from_its_config(tiny_card: Card) -> None:
    rows = economy(tiny_card.source)
    assert sum(row.of_all for row in rows) == pytest.approx(1)
    assert [row.trained["align"] for row in rows] == [False, True, False]


def test_a_model_that_is_not_here_is_said_to_be_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["lens", "--model", "somebody/model"]) == 2
    assert "not on this machine" in capsys.readouterr().err


def test_memory_grows_with_precision() -> None:
    taken = memory(PRESETS[2])
    assert taken["4bit"] < taken["8bit"] < taken["float32"]
    assert taken["bfloat16"] < taken["float32"]


def test_the_catalogue_says_what_each_model_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "--catalogue"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table] == [preset.name for preset in PRESETS]
    assert "4bit 7.6 GB" in next(row for row in table if row.startswith("LLaVA-1.5-7B "))


def test_the_page_shows_a_bar_for_every_family_and_context() -> None:
    chart = share_chart("1344x672")
    assert chart.count("class='bar'") == len(families()) * len(CONTEXTS)
    assert "1,752</td><td>85.5%" in chart
    assert "12 is no size" in share_chart("12")


def test_the_page_shows_the_parts_of_a_listed_model(tmp_path: Path) -> None:
    models = Models(lambda _: pytest.fail("nothing is loaded"), lambda: (built_in(), ""), runs=tmp_path)
    table = parts_table(models, "built-in/memeworld")
    assert table.count("trains") == 3  # the projector in both stages, the language model in one
    assert "not in the list" in parts_table(models, "nothing")
