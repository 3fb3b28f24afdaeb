"""How much one visitor may ask of the page, and all visitors together."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Network, ip_address
from threading import Lock

from llava_app.conversation import Conversation
from llava_app.errors import BusyError, ContextError, ImageError
from llava_app.images import Picture, living_bytes

MINUTE = 60.0  # s
SECOND = 1.0  # s; what comes within one is counted as one
FRAMES = 4  # of a clip that cost what a picture does: OneVision keeps a quarter of a frame's features
MOST_VISITORS = 10_000  # that are remembered; the one that was not seen for longest goes first


@dataclass(frozen=True)
class Limits:
    """Bounds of a page. A visitor is an address, as `network` has it, or a name where people log in."""

    questions: int  # of a visitor in a minute
    running: int  # answers of a visitor at the same time
    waiting: int  # answers of all visitors at the same time, those that wait for their turn included
    pictures: int  # in a message
    pictures_kept: int  # in a conversation; of a clip every four frames count as one
    picture_bytes: int  # of the pictures of all visitors in memory, three bytes a pixel
    characters: int  # in a question
    characters_kept: int  # in a conversation, answers included, that is asked something
    new_tokens: int  # of an answer
    requests: int  # of a visitor in a minute, of those that change something (POST)
    open: int  # requests of a visitor at the same time; a tab holds two
    tabs: int  # of a visitor
    body: int  # bytes of a request
    sent: int  # bytes of a visitor in a minute


LOCAL = Limits(
    questions=600,
    running=16,
    waiting=256,
    pictures=8,
    pictures_kept=200,
    picture_bytes=6_000_000_000,
    characters=20_000,
    characters_kept=4_000_000,
    new_tokens=2048,
    requests=30_000,
    open=1_000,
    tabs=500,
    body=1_000_000_000,
    sent=6_000_000_000,
)
# A tab of the page sends some 24 requests a minute by itself, and a class of thirty may share one address.
PUBLIC = Limits(
    questions=20,
    running=3,
    waiting=64,
    pictures=4,
    pictures_kept=16,
    picture_bytes=2_000_000_000,
    characters=4_000,
    characters_kept=100_000,
    new_tokens=512,
    requests=1_200,
    open=200,
    tabs=40,
    body=64_000_000,
    sent=300_000_000,
)


def bounded(question: str, limits: Limits) -> str:
    """The question. Raises ContextError when it is far too long."""
    if len(question) > limits.characters:
        raise ContextError(
            f"The question has {len(question):,} characters; the limit is {limits.characters:,}. Shorten it, then send."
        )
    return question


def check(conversation: Conversation, limits: Limits) -> None:
    """Before anything is asked of it. Raises ImageError or ContextError when it is more than this page takes."""
    pictures = sum(map(_cost, conversation.pictures))
    if pictures > limits.pictures_kept:
        raise ImageError(
            f"With this the conversation would hold {pictures} pictures, of a clip {FRAMES} frames counted as one; "
            f"the limit is {limits.pictures_kept}. Send less, or start a new chat."
        )
    for turn in conversation.turns:
        bounded(turn.question, limits)
    letters = characters(conversation)
    if letters > limits.characters_kept:
        raise ContextError(
            f"The conversation has {letters:,} characters; the limit is {limits.characters_kept:,}. Start a new chat."
        )


def check_kept(conversation: Conversation, limits: Limits) -> None:
    """As `check`, for one that comes back; the answer to the last question that was allowed may go beyond."""
    check(conversation, replace(limits, characters_kept=2 * limits.characters_kept))


def characters(conversation: Conversation) -> int:
    """Of all questions and answers, and of the system prompt."""
    return len(conversation.system or "") + sum(
        len(turn.question) + len(turn.answer or "") for turn in conversation.turns
    )


def _cost(picture: Picture) -> int:
    return 1 if picture.stills == (picture,) else -(-len(picture.stills) // FRAMES)


def check_room(limits: Limits) -> None:
    """Before a picture is decoded. Raises BusyError when those in memory leave no room for it."""
    if living_bytes() >= limits.picture_bytes:
        raise BusyError(
            f"The pictures of all conversations here fill {limits.picture_bytes / 1e9:,.1f} GB of memory, which is the "
            "limit. Ask without a picture, or send it again in a few minutes."
        )


def network(address: str) -> str:
    """What counts as one address: of IPv6 the /64, all of which one line has; what is no address stays as it is."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or IPv6Network((int(ip) >> 64 << 64, 64)))


class Rate:
    """At most so many in a minute, for each visitor. For any thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._counts: OrderedDict[str, deque[tuple[float, int]]] = OrderedDict()  # when and how many
        self._lock = Lock()

    def wait(self, visitor: str, amount: int = 1) -> float:
        """Count so many more: 0, or in how many seconds there is room for some and these are not counted."""
        now = time.monotonic()
        with self._lock:
            counts = self._counts.setdefault(visitor, deque())
            self._counts.move_to_end(visitor)
            while len(self._counts) > MOST_VISITORS:
                self._counts.popitem(last=False)
            while counts and now - counts[0][0] >= MINUTE:
                counts.popleft()
            if counts and sum(count for _, count in counts) + amount > self.most:
                return MINUTE - (now - counts[0][0])
            if counts and now - counts[-1][0] < SECOND:  # so that a visitor takes sixty places and no more
                now, before = counts.pop()
                amount += before
            counts.append((now, amount))
        return 0.0


class Gate:
    """Where every question passes. For any thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._rate = Rate(limits.questions)
        self._running: Counter[str] = Counter()
        self._lock = Lock()

    def count(self, visitor: str) -> None:
        """One more question of this visitor. Raises BusyError when there were too many, saying when to go on."""
        seconds = self._rate.wait(visitor)
        if seconds:
            raise BusyError(
                f"You asked {self.limits.questions} questions within a minute, which is the limit. "
                f"Send again in {seconds:.0f} seconds."
            )

    @contextmanager
    def enter(self, visitor: str) -> Iterator[None]:
        """While a question of this visitor, which this counts, is read and answered. Raises BusyError as below."""
        with self.answer(visitor):
            self.count(visitor)
            yield

    @contextmanager
    def answer(self, visitor: str) -> Iterator[None]:
        """While a counted question is answered. Raises BusyError at a limit, saying which and what to do."""
        self._take(visitor)
        try:
            yield
        finally:
            with self._lock:
                self._running[visitor] -= 1
                self._running += Counter()  # drops those at zero

    def _take(self, visitor: str) -> None:
        limits = self.limits
        with self._lock:
            if self._running.total() >= limits.waiting:
                raise BusyError(
                    f"{limits.waiting} answers are being written or wait already, which is the limit. "
                    "Send again in a minute."
                )
            if self._running[visitor] >= limits.running:
                raise BusyError(
                    f"{limits.running} of your answers are being written already, which is the limit. "
                    "Wait for one, or stop it."
                )
            self._running[visitor] += 1
