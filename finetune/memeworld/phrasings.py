"""How people ask. Each kind of question has patterns: `(a|b)` is a choice, `(a|)` may be left out, `{name}` is filled.

`UNSEEN` holds phrasings that no pattern can produce, to measure how far what was learned carries.
"""

import random
import re

CHOICE = re.compile(r"\(([^()]*)\)")

PATTERNS: dict[str, tuple[str, ...]] = {
    "what": (
        "What is (in|on|shown in) (the|this) (picture|image|photo|meme)?",
        "What('s| is) (in|on) (it|here|this)?",
        "What (do|can) you see( here| in the picture| in this image|)?",
        "What (is|are) (this|that|these)?",
        "What does (the|this) (picture|image|photo|meme) show?",
        "(Name|List) (the things|everything|what you see)( in the picture| here|).",
        "Which (things|objects) (are|do you see) (here|in the picture)?",
        "(Tell me|Say) what (is|you see) (here|in the picture|in this).",
        "What am I looking at?",
    ),
    "colour": (
        "What (colour|color) (is|are) the {things}?",
        "(Which|What) (colour|color) (does|do) the {things} have?",
        "(Tell me|Say|Name) the (colour|color) of the {things}.",
        "What('s| is) the (colour|color) of the {things}?",
        "The {things}, what (colour|color)?",
        "(And|So) what (colour|color) (is|are) the {things}?",
        "In (which|what) (colour|color) (is|are) the {things}( drawn| painted|)?",
    ),
    "where": (
        "Where is the {thing}?",
        "Where('s| is) the {thing}( in the picture| here| standing|)?",
        "(On which|Which|On what|What) side is the {thing}( on|)?",
        "Where (do|can) you (see|find) the {thing}?",
        "Is the {thing} (on the left, in the middle or on the right|left, middle or right)?",
        "(Tell me|Say) where the {thing} is.",
        "What is the (place|position) of the {thing}?",
        "Where in the (picture|image) is the {thing}?",
    ),
    "count": (
        "How many {plural} (are there|are here|do you see|can you see)( in the picture| here|)?",
        "How many {plural}?",
        "(Count|Please count) the {plural}.",
        "What is the number of {plural}?",
        "(Tell me|Say) how many {plural} (there are|you see).",
        "How many {plural} (are|are there) in (this|the) (picture|image|meme)?",
    ),
    "count_all": (
        "How many things (are there|are here|do you see|can you see)( in the picture| here|)?",
        "How many (objects|things) (are|are there) in (this|the) (picture|image|meme)?",
        "(Count|Please count) (the|all the) things.",
        "(Tell me|Say) how many things there are.",
    ),
    "size": (
        "(Is|Are) the {things} (big or small|small or big)?",
        "How (big|large|small) (is|are) the {things}?",
        "What (size|is the size) (is|of) the {things}?",
        "What('s| is) the size of the {things}?",
        "(Tell me|Say) (whether|if) the {things} (is|are) (big or small|small or big).",
        "(Is|Are) the {things} (large or tiny|big or little)?",
    ),
    "background": (
        "What('s| is) (the|in the) background?",
        "(Which|What) (background|scenery|setting) is (it|this|that)?",
        "What('s| is) behind the {things}?",
        "Where was this (picture|photo|meme) (taken|made)?",
        "(Where|In what place) (is|does) this (scene|picture|meme) (set|play|happen)?",
        "What (kind of|sort of) place is (it|this|that)?",
        "(Describe|Name|Tell me) the (background|setting|place).",
    ),
    "text": (
        "What (does|is) the (text|caption|writing) say?",
        "What does (it|the meme|the picture|the image) say?",
        "(Read|Read out|Please read) (the text|the caption|the words|it|the meme)( to me| aloud|).",
        "What( is|'s) (written|the text|the caption|the writing)( here| there| on it| in the picture|)?",
        "What (words|letters|text) (are|is|do you see) (written|in the picture|on it|here)?",
        "Can you read (the text|the caption|what it says|the words)?",
        "What text (is there|do you see|is in the picture)?",
        "(Tell me|Say) what (it says|is written|the caption says).",
    ),
    "exists": (
        "(Is|Are) there (a|any) {word}( in the picture| here| in this image|)?",
        "(Do|Can) you see (a|any) {word}( here| in the picture|)?",
        "Does (the|this) (picture|image|meme) (show|have|contain) (a|any) {word}?",
        "Any {word} (here|in it|in the picture)?",
        "(Tell me|Say) (whether|if) there is a {word}.",
    ),
    "check": (
        "(Is|Are) the {things} {colour}?",
        "(Do|Does) the {things} (look|seem) {colour}?",
        "The {things} (is|are) {colour}, (right|correct|true|yes)?",
        "Is it (true|right) that the {things} (is|are) {colour}?",
        "(Is|Are) the {things} {colour} or not?",
    ),
    "describe": (
        "(Describe|Summarise) (the|this) (picture|image|photo|meme|scene)( in detail| for me| to me|).",
        "(Describe|Caption) (it|this|what you see).",
        "(Give|Write) (me|) a (description|caption)( of the picture| of this|).",
        "(Tell me|Say) (everything|all|more) about (the|this) (picture|image|scene).",
        "What is (going on|happening)( here| in the picture|)?",
        "Can you describe (it|this|the picture|the image|the scene)?",
        "Describe everything( you see| in detail|).",
    ),
    "funny": (
        "Is (this|it|the meme|the picture|that) (funny|a joke|a meme|meant to be funny)?",
        "Is there a joke( here| in it| in the picture|)?",
        "(Do|Does) (you find|people find|anyone find) (this|it) funny?",
        "Is (this|it) (supposed|meant) to be (funny|a joke)?",
        "(Is|Was) (this|that|it) (a joke|a funny one|funny at all)?",
        "Funny or not?",
    ),
    "joke": (
        "What('s| is) the joke( here| in this picture| of this meme| about|)?",
        "What('s| is) (so |)(funny|amusing|wrong)( about this| about it| in this picture| with this|)?",
        "Why is (this|it|the meme|that|the picture) (so |)(funny|amusing|a joke|hilarious)?",
        "(Explain|Tell me) the (joke|meme|fun|punchline)( to me| please|).",
        "(Explain|Tell me) this (joke|punchline)( to me| please|).",
        "(Explain|Tell me) (why|what makes) (this|it) (is |)(funny|a joke|amusing).",
        "(What|How) makes (this|it|the meme|the picture) (funny|a joke|amusing)?",
        "(I don't|I do not|I didn't) (get|understand) (it|the joke|this|the meme)(, can you explain|, help me|).",
        "(Can|Could|Would) you explain (the joke|the meme|this|why it is funny)?",
        "Why (do|would|are) (people|they|others|my friends) (laugh|laughing|smile)( at this| about it|)?",
        "What( is|'s) (there to laugh about|the punchline|the point of the joke|the humour|the humor)?",
        "Where is the (joke|humour|humor|punchline)( here| in this|)?",
        "What does (this meme|the meme|the joke) mean?",
        "Where does the caption go wrong?",
        "(Make|Help) me (understand|get) (the joke|the meme|it|this).",
        "What should (I|we|one) find (funny|amusing)( here| in this|)?",
    ),
    "why": ("Why?", "Why (not|so|is that)?", "How come?", "(Can you|Please) explain (why|that)?", "Explain."),
    "and": ("And the {things}?", "(And what|What|And how) about the {things}?", "The {things}?"),
    "where_it": ("(And|) (where|Where) is it?", "Where('s| is) (it|that) (then|exactly|)?", "On which side?"),
    "person": (
        "Who is (this|that|the person|the man|the woman|in the picture)?",
        "What('s| is) (his|her|their|the person's) name?",
        "(Do|Can) you (know|recognise|recognize|identify|name) (this|the|that) (person|man|woman|face)?",
        "(Who|Which person|Which celebrity) (is|do you see) (here|in the picture|this)?",
        "(Name|Identify) the (person|man|woman)( here| in the picture|).",
        "Who (drew|made|posted|owns) (this|it|the {thing})?",
    ),
    "mind": (
        "What is the {thing} (thinking|feeling|dreaming about|planning)?",
        "(How does|What does) the {thing} (feel|think|want)?",
        "(Is|Was) the {thing} (happy|sad|angry|tired|bored)?",
        "What does the {thing} (think|want|feel|dream of)?",
        "Is the {thing} in a good mood?",
    ),
    "hello": ("(Hello|Hi|Hey|Good morning|Good evening|Hi there)( you|)", "How are you?", "Hey, what's up?"),
    "thanks": ("(Thanks|Thank you|Thx|Great|Cool|Nice)(, thanks| a lot| very much|)", "Well done", "OK, good"),
    "other": (
        "(What is|Calculate) (two plus two|one plus one|the square root of nine)?",
        "(Write|Tell) me a (poem|story|song|letter|recipe)( about love| about the sea|).",
        "What('s| is) the (weather|time|capital of France|date today|news)?",
        "(Who|What) (are you|is the president|wrote Hamlet|can you do|do you know)?",
        "(Translate|Say) (hello|good morning|this) (to|in) (French|German|Spanish).",
        "(Help me|Can you) (write|fix|learn) (code|python|english|a letter).",
    ),
}  # fmt: skip

# Nouns outside memeworld, for "is there a …?".
STRANGERS = (
    "giraffe", "elephant", "horse", "phone", "pizza", "guitar", "bicycle", "train", "plane", "chair", "table", "clock",
    "book", "banana", "lamp", "cow", "pig", "lion", "dragon", "person", "robot", "shoe", "key", "bus", "mouse",
)  # fmt: skip

OPENERS = ("please ", "hey, ", "so ", "ok, ", "um ", "tell me: ", "quick question: ", "hi! ", "well, ", "now ")
CLOSERS = (" please", " pls", " thanks", " thx", " please?", " ok?", " lol", " now")

# kind of answer → phrasings that training never produces.
UNSEEN: tuple[tuple[str, str], ...] = (
    ("joke", "whats funny here"),
    ("joke", "why should i laugh"),
    ("joke", "explain this meme pls"),
    ("joke", "i dont see what the joke is supposed to be"),
    ("joke", "so whats the fun part"),
    ("joke", "my friend laughed at this, why?"),
    ("joke", "Could you please tell me why somebody would find this amusing?"),
    ("joke", "joke explanation please"),
    ("joke", "what did they get wrong in the caption"),
    ("joke", "Why would this make me smile?"),
    ("text", "can u read me the caption"),
    ("text", "which words are on this meme"),
    ("text", "what's the writing on the picture say"),
    ("describe", "can you give me a full description"),
    ("describe", "describe whats going on in this image please"),
    ("what", "so what is in this one"),
    ("what", "tell me which things you can see"),
    ("colour", "{things}: which color?"),
    ("colour", "could you name the colour of the {things} for me"),
    ("count", "how many {plural} did they draw"),
    ("count", "give me the number of {plural} in the image"),
    ("where", "whereabouts is the {thing}"),
    ("where", "on what side do i find the {thing}"),
    ("size", "would you say the {things} is big or is it small"),
    ("background", "what do we have in the background"),
    ("funny", "is that supposed to be a joke or what"),
)


def phrase(rng: random.Random, kind: str, names: dict[str, str]) -> str:
    """One way to ask: a pattern with its choices made and its names filled in, typed as carelessly as people do."""
    text = rng.choice(PATTERNS[kind])
    while CHOICE.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text, count=1)
    return _careless(rng, " ".join(text.format(**names).split()))


def _careless(rng: random.Random, text: str) -> str:
    if rng.random() < 0.12:
        text = rng.choice(OPENERS) + text[0].lower() + text[1:]
    if rng.random() < 0.45:
        text = text.rstrip("?.")
        if rng.random() < 0.25:
            text += rng.choice(CLOSERS)
    if rng.random() < 0.4:
        text = text.lower()
    if rng.random() < 0.4:
        text = text.replace("'", "")
    if rng.random() < 0.05:
        text = _mistyped(rng, text)
    return text


def _mistyped(rng: random.Random, text: str) -> str:
    """A letter left out, two swapped, or one doubled."""
    at = rng.randrange(len(text) - 1)
    before, here, following, after = text[:at], text[at], text[at + 1], text[at + 2 :]
    return before + rng.choice((following, following + here, here + here + following)) + after
