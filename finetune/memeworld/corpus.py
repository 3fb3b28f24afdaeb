"""What the language model of memeworld reads before any picture: scenes in words, talked about; and its tokenizer."""

import random
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune.memeworld import talk
from finetune.memeworld.words import as_text
from finetune.memeworld.world import Scene, make_scene
from llava_app.conversation import Conversation
from llava_app.prompts import render, template_text

VOCABULARY = 1024
DIALOGUE_LENGTH = 256  # tokens of a row; longer dialogues are cut
CAPTION_LENGTH = 128
SCENES = {"train": 0.85, "combinations": 0.15}  # words may name the combinations that pictures never show

Rows = tuple[np.ndarray, np.ndarray]  # input ids (B, S) int64, supervised (B, S) bool


def train_tokenizer(documents: int = 12_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens, learned from the dialogues themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(documents), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _texts(documents: int) -> Iterator[str]:
    for number in range(documents):
        rng = random.Random(f"tokenizer/{number}")
        exchanges, scene = _dialogue(rng, 6)
        asked = [f"USER: {exchange.question} ASSISTANT: {exchange.answer}" for exchange in exchanges]
        yield "\n".join([as_text(rng, scene), *asked])
        if number % 10 == 0:
            greeting = Conversation().ask("Hello").answer("Hello!")
            yield render(greeting, template_text("vicuna_v1"), open_answer=False).text


def _scene(rng: random.Random) -> Scene:
    """More often than pictures do, it shows different things: whose colour is whose takes longest to learn."""
    split = rng.choices(list(SCENES), list(SCENES.values()))[0]
    pair = [make_scene(split, rng.randrange(10**9, 2 * 10**9)) for _ in range(2)]  # numbers that no picture uses
    return max(pair, key=lambda scene: len({thing.kind for thing in scene.things}))


def _dialogue(rng: random.Random, turns: int) -> tuple[list[talk.Exchange], Scene]:
    scene = _scene(rng)
    return talk.dialogue(rng, scene, turns), scene


def text_conversation(rng: random.Random) -> Conversation:
    """A dialogue about a scene told in words; one in twenty is about no scene at all, and says so."""
    exchanges, scene = _dialogue(rng, rng.randint(7, 11))
    if rng.random() < 0.05:
        return without_picture(rng, scene)
    conversation = Conversation().ask(f"{as_text(rng, scene)}\n{exchanges[0].question}").answer(exchanges[0].answer)
    for exchange in exchanges[1:]:
        conversation = conversation.ask(exchange.question).answer(exchange.answer)
    return conversation


def without_picture(rng: random.Random, scene: Scene) -> Conversation:
    """Questions with nothing to look at."""
    conversation = Conversation()
    for kind in rng.choices(list(talk.WEIGHTS), k=rng.randint(1, 3)):
        exchange = talk.ask(rng, scene, kind)
        answer = exchange.answer if kind in ("hello", "thanks", "other") else talk.NO_PICTURE
        conversation = conversation.ask(exchange.question).answer(answer)
    return conversation


def dialogue_rows(rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int) -> Rows:
    """`count` dialogues about scenes in words; the answers and their end tokens are supervised."""
    template = template_text("vicuna_v1")
    conversations = [text_conversation(rng) for _ in range(count)]
    return _rows(tokenizer, [_pieces(c, template) for c in conversations], DIALOGUE_LENGTH)


def _pieces(conversation: Conversation, template: str) -> list[tuple[str, bool]]:
    """The training text in pieces, unsupervised and supervised in turn, cut where an answer begins and ends."""
    rendered = render(conversation, template, open_answer=False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for begin, end in rendered.answers:
        pieces += [(rendered.text[done:begin], False), (rendered.text[begin:end], True)]
        done = end
    return pieces


def caption_rows(rng: random.Random, tokenizer: PreTrainedTokenizerFast, count: int) -> Rows:
    """`count` scenes in words, each followed by its short caption; the caption is supervised."""
    scenes = [_scene(rng) for _ in range(count)]
    return _rows(
        tokenizer,
        [[(as_text(rng, s) + "\n", False), (talk.caption(s) + "\n", True)] for s in scenes],
        CAPTION_LENGTH,
    )


def _rows(tokenizer: PreTrainedTokenizerFast, documents: list[list[tuple[str, bool]]], length: int) -> Rows:
    ids = np.full((len(documents), length), tokenizer.pad_token_id, np.int64)
    supervised = np.zeros((len(documents), length), bool)
    for row, pieces in enumerate(documents):
        encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        at = 1
        ids[row, 0] = tokenizer.bos_token_id
        for piece, (_, learn) in zip(encoded, pieces, strict=True):
            piece = piece[: length - at]
            ids[row, at : at + len(piece)] = piece
            supervised[row, at : at + len(piece)] = learn
            at += len(piece)
    return ids, supervised
