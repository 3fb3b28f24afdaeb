"""Questions and answers as Markdown for the Chatbot, which holds no HTML but ours and fetches nothing.

What is code is decided here, not by the browser's parser, with which one would never quite agree: code goes out as
HTML whose text is made of references like &#60;, and no backtick is left. So whatever that parser takes for what, it
finds no tag of an answer, no picture and no diagram.
"""

import html
import re
from collections.abc import Callable

# A fence and what it encloses, up to its end or that of the text; it may stand in a list or a quote.
_FENCE = re.compile(
    r"^(?P<lead>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?P<mark>`{3,}(?=[^`\n]*$)|~{3,})[^\n]*\n?"
    r"(?P<code>.*?)(?:^[ \t>]*(?P=mark)[`~]*[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
# Equal runs of backticks and what stands between them, in one paragraph; bounded, or many that do not match take long.
_SPAN = re.compile(r"(?<![\\`])(?P<mark>`+)(?!`)(?P<code>(?:[^\n]|\n(?![ \t]*\n)){1,500}?)(?<!`)(?P=mark)(?!`)")
DEEPEST = 3  # spaces before a block of code; with four Markdown would take our HTML for code itself


def as_written(text: str) -> str:
    """A model's answer as Markdown: it may format text and link, but its tags are text and it shows no pictures."""
    return _outside(text, _FENCE, _block, lambda rest: _outside(rest, _SPAN, _span, _prose))


def as_typed(text: str) -> str:
    """Markdown that shows a question character for character."""
    text = re.sub(r"([\\`*_~\[\]|])", r"\\\1", html.escape(text, quote=False))
    text = re.sub(r"^( *)(#|[-+=])", r"\1\\\2", text, flags=re.MULTILINE)
    text = re.sub(r"^( *\d+)([.)])", r"\1\\\2", text, flags=re.MULTILINE)
    return re.sub(r"^ +", lambda spaces: "&nbsp;" * len(spaces[0]), text, flags=re.MULTILINE)


def _outside(
    text: str, pattern: re.Pattern[str], inside: Callable[[re.Match[str]], str], around: Callable[[str], str]
) -> str:
    """The text with each match made by `inside`, and what stands between them by `around`."""
    parts, end = [], 0
    for match in pattern.finditer(text):
        parts += [around(text[end : match.start()]), inside(match)]
        end = match.end()
    return "".join([*parts, around(text[end:])])


def _block(fence: re.Match[str]) -> str:
    """One line of HTML, which stays in the list or quote that the fence stood in."""
    lead = fence["lead"].expandtabs(4)
    margin = re.compile(rf"^[ \t{'>' * ('>' in lead)}]{{0,{len(lead)}}}", re.MULTILINE)
    lead = lead if lead.strip() else lead[:DEEPEST]
    return f"{lead}<pre><code>{_referred(margin.sub('', fence['code']))}</code></pre>"


def _span(span: re.Match[str]) -> str:
    code = span["code"].replace("\n", " ")
    is_padded = code[0] == code[-1] == " " and code.strip()
    return f"<code>{_referred(code[1:-1] if is_padded else code)}</code>"


def _referred(code: str) -> str:
    return re.sub(r"[^\w ]|_", lambda character: f"&#{ord(character[0])};", code)


def _prose(text: str) -> str:
    return re.sub(r"(?<!\\)(\\*)([<&`])", _unescaped, text).replace("![", "!\\[")


def _unescaped(found: re.Match[str]) -> str:
    """The reference without the backslash that escapes the character, which would escape the reference."""
    backslashes, character = found.groups()
    return backslashes[: len(backslashes) // 2 * 2] + f"&#{ord(character)};"
