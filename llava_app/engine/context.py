"""What of a long conversation the model is shown."""

from collections.abc import Callable
from dataclasses import replace

from llava_app.conversation import Conversation
from llava_app.errors import ContextError

Count = Callable[[Conversation], int]  # tokens of the prompt, pictures included


def fit(conversation: Conversation, count: Count, *, limit: int, room: int) -> tuple[Conversation, str | None]:
    """The conversation as the model can read it, with `room` tokens for an answer, and what was left out of it.

    The oldest turns go first, and their pictures stay, since a later question may be about them; then the oldest
    pictures. Half of the context is emptied at a time, so that the next questions find a beginning that the model has
    read already. Raises ContextError when the last question alone does not fit with even one token of an answer.
    """
    if count(conversation) + room <= limit or len(conversation.turns) == 1:
        _check(conversation, count, limit=limit)
        return conversation, None
    kept = _without_first(conversation, _turns_to_leave_out(conversation, count, limit - room))
    while len(kept.turns) > 1 and count(kept) + room > limit:
        kept = _without_first(kept, 1)
    while count(kept) + room > limit and len(kept.pictures) > len(conversation.turns[-1].images):
        kept = _without_first_picture(kept)
    _check(kept, count, limit=limit)
    turns = len(conversation.turns) - len(kept.turns)
    return kept, _said(turns, len(conversation.pictures) - len(kept.pictures), limit=limit)


def _turns_to_leave_out(conversation: Conversation, count: Count, most: int) -> int:
    """How many of the first turns have gone by now, if half of a full context was emptied each time."""
    turns = conversation.turns
    bare = count(replace(conversation, turns=turns[-1:])) - count(Conversation(turns[-1:], system=""))
    sizes = [count(Conversation((turn,), system="")) for turn in turns]
    asked = [count(Conversation((replace(turn, answer=None, finish=None),), system="")) for turn in turns]
    without = [count(Conversation((replace(turn, images=()),), system="")) for turn in turns]
    pictures = [size - text for size, text in zip(sizes, without, strict=True)]
    first = 0
    for last in range(len(turns)):
        open_sizes = [*sizes[:last], asked[last]]  # as it was when the question was asked
        if _size(open_sizes, pictures, first, last) + bare > most:
            while first < last and _size(open_sizes, pictures, first, last) + bare > most // 2:
                first += 1
    return first


def _size(sizes: list[int], pictures: list[int], first: int, last: int) -> int:
    return sum(pictures[:first]) + sum(sizes[first : last + 1])


def _without_first(conversation: Conversation, turns: int) -> Conversation:
    """Without the first `turns` turns; their pictures come to the turn after them."""
    gone, kept = conversation.turns[:turns], conversation.turns[turns:]
    pictures = tuple(picture for turn in gone for picture in turn.images)
    return replace(conversation, turns=(replace(kept[0], images=pictures + kept[0].images), *kept[1:]))


def _without_first_picture(conversation: Conversation) -> Conversation:
    number = next(i for i, turn in enumerate(conversation.turns) if turn.images)
    turn = conversation.turns[number]
    shorter = replace(turn, images=turn.images[1:])
    return replace(conversation, turns=(*conversation.turns[:number], shorter, *conversation.turns[number + 1 :]))


def _check(conversation: Conversation, count: Count, *, limit: int) -> None:
    length = count(conversation)
    if length >= limit:
        raise ContextError(
            f"This message has {length:,} tokens, pictures included, and the model reads at most {limit:,}, "
            "its answer included. Shorten the question, leave a picture out, or start a new chat."
        )


def _said(turns: int, pictures: int, *, limit: int) -> str:
    questions = "the first question" if turns == 1 else f"the first {turns} questions"
    gone = f"{questions} and {pictures} of the pictures" if pictures else questions
    return f"The model reads {limit:,} tokens at most and no longer sees {gone}."
