"""Model text as people are meant to read it: Markdown, of which only harmless elements are left."""

import html
import re
from collections import Counter
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt

MAX_LENGTH = 20_000  # characters; what is longer is shown as it was written

# No raw HTML. Links and images stay as they are written: the reader shall see where a link leads, and an image would
# be loaded from elsewhere.
_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_PARSER.disable(["link", "image", "autolink", "reference", "html_block", "html_inline", "entity"])
_INLINE = ("p", "br")
_TAGS = {*_INLINE, "blockquote", "code", "em", "h4", "hr", "li", "ol", "pre", "s", "strong", "ul"}
_TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
_WORD = re.compile(r"[^\W_]+")
# Of lists and code: shown in another way.
_MARKERS = re.compile(r"^[ \t>*+-]*(\d+[.)]|(```+|~~~+) *\S*[ \t\r]*$)", re.M)


@lru_cache(maxsize=1000)
def render(text: str) -> str | None:
    """Safe HTML, or None where the text is better shown as it is written.

    That is a text without Markdown, one that is too long, and one of which HTML would leave words out: cells of a
    table beyond its header, or what is nested too deeply.
    """
    if len(text) > MAX_LENGTH:
        return None
    tokens = _PARSER.parse(text)
    if not any(token.tag not in ("", *_INLINE) for token in [*tokens, *(t for b in tokens for t in b.children or ())]):
        return None
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = "h4"  # below the page's own headings
    rendered = _PARSER.renderer.render(tokens, _PARSER.options, {})
    safe = nh3.clean(rendered, tags=_TAGS, attributes={"ol": {"start"}}, link_rel=None)
    shown = html.unescape(re.sub("<[^>]*>", " ", safe))
    lost = Counter(_WORD.findall(_MARKERS.sub("", text))) - Counter(_WORD.findall(shown))
    return None if lost else safe
