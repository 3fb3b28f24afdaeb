"""Checkpoint folders from strangers: nothing in them is run, and what they say of themselves is checked."""

import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.export import export
from llava_app.checkpoints import Card, read_card, revision, write_card
from llava_app.cli.space import space_files
from llava_app.conversation import Conversation
from llava_app.errors import ModelError
from llava_app.loading import load
from llava_app.prompts import encode
from llava_app.ui.display import facts, status


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def folder(tiny_card: Card, tmp_path: Path) -> Path:
    """A sound checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_card.source, tmp_path / "Tiny"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What is there once foreign code has run."""
    return tmp_path / "it ran"


def change(file: Path, **values: Any) -> None:
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(stored | values), encoding="utf-8")


def forge(folder: Path) -> None:
    """Write the card anew: who brings a bad file along has a card that fits it."""
    write_card(folder, read_card(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_not_opened(folder: Path, trace: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(trace)))
    change(folder / "card.json", files={})
    with pytest.raises(ModelError, match="Tiny cannot be loaded"):
        load(read_card(folder), "float32")
    assert not trace.exists()


def test_a_pickle_that_calls_itself_safetensors_is_refused(folder: Path, trace: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ModelError, match="Tiny cannot be loaded"):
        load(read_card(folder), "float32")
    assert not trace.exists()


def test_an_adapter_in_a_pickle_is_not_opened(folder: Path, trace: Path, tiny_card: Card) -> None:
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(trace)))
    change(folder / "adapter_config.json", base_model_name_or_path=tiny_card.source, peft_type="LORA")
    change(folder / "card.json", files={})
    with pytest.raises(ModelError):
        load(read_card(folder), "float32")
    assert not trace.exists()


def test_code_that_a_checkpoint_brings_along_is_not_run(folder: Path, trace: Path) -> None:
    code = f"import os\nos.mkdir({str(trace)!r})\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoTokenizer", "AutoProcessor")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        change(folder / file, auto_map=dict.fromkeys((*classes, "AutoImageProcessor"), "evil.Evil"))
    forge(folder)
    load(read_card(folder), "float32")
    assert not trace.exists()


def test_a_model_that_exists_in_its_own_code_alone_is_refused(folder: Path, trace: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n", encoding="utf-8")
    change(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    forge(folder)
    with pytest.raises(ModelError, match="Tiny cannot be loaded"):
        load(read_card(folder), "float32")
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('TRACE') }}",
        "{{ messages.__class__.__base__ }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(folder: Path, trace: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template.replace("TRACE", str(trace)), encoding="utf-8")
    forge(folder)
    loaded = load(read_card(folder), "float32")
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        encode(Conversation().ask("What?"), loaded.processor, open_answer=True)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"template": "../../../etc/passwd"}, "There is no template"),
        ({"template": "no-such-template"}, "There is no template"),
        ({"image_mode": "anyres"}, "cannot see pictures in the mode anyres"),
        ({"image_mode": "everything"}, "missing or wrong image_mode"),
        ({"stage": "finished"}, "missing or wrong stage"),
        ({"files": {"no-such-file": "0"}}, "lacks no-such-file"),
        ({"format": 99}, "has format 99"),
        ({"name": 7}, "missing or wrong name"),
    ],
)
def test_a_card_that_lies_is_refused_by_what_it_lies_about(folder: Path, lie: dict[str, Any], told: str) -> None:
    change(folder / "card.json", **lie)
    with pytest.raises(ModelError, match=told):
        load(read_card(folder), "float32")


def test_a_card_that_lies_about_its_template_is_told(folder: Path) -> None:
    change(folder / "card.json", template="llama_3")
    assert "Its own chat template differs from llama_3" in load(read_card(folder), "float32").why


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_not_the_one_of_the_card_is_named_and_not_used(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(
        ModelError, match=rf"^{re.escape(name)} of Tiny changed or went away after its card\.json was written"
    ):
        load(read_card(folder), "float32")
    files = {other: digest for other, digest in read_card(folder).files.items() if other != name}
    change(folder / "card.json", files=files)  # what the message says of a change of one's own
    load(read_card(folder), "float32")


def test_other_weights_than_those_of_the_card_are_not_handed_on(folder: Path, tmp_path: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    for hand_on in (lambda: export(folder, tmp_path / "out"), lambda: space_files(read_card(folder))):
        with pytest.raises(ModelError, match=r"^model\.safetensors of Tiny changed or went away"):
            hand_on()


def test_an_adapter_whose_card_names_another_base_is_refused(folder: Path, tiny_card: Card, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "Other"))
    write_card(other, replace(read_card(other), name="Other", about="Trained on something else."))
    change(folder / "adapter_config.json", base_model_name_or_path=tiny_card.source)
    change(folder / "card.json", base=str(other), base_revision=revision(other))
    with pytest.raises(ModelError, match=r"says that its base is Other, and its adapter_config\.json says"):
        load(read_card(folder), "float32")


def test_a_card_cannot_say_where_it_lies_or_that_it_was_built_in(folder: Path) -> None:
    change(folder / "card.json", source="/etc", kind="built-in")
    assert (read_card(folder).source, read_card(folder).kind) == (str(folder), "run")


def test_markup_in_a_card_stays_text(folder: Path) -> None:
    script = "<script>alert(1)</script>"
    change(folder / "card.json", name=script, about=script, base=script, data={script: script})
    card = read_card(folder)
    assert "<script" not in status(card.about, state="ready", why=card.name, facts=facts(card))
