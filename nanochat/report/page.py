"""Turns markdown into one self-contained HTML page, with its pictures embedded.

Markdown comes from this program; text that does not (settings, names, answers of a model) is put into it by `escaped`.
"""

import base64
import mimetypes
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #22252a; --pale: #5d6570; --line: #d5dae2; --head: #eef3fa; --blue: #1f4e8c }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #dfe3e8; --pale: #9aa3ae; --line: #363c45; --head: #20262e; --blue: #8ab4f0 }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word;
  background: var(--paper); color: var(--ink) }
h1, h2, h3 { color: var(--blue); line-height: 1.25 } h2 { margin-top: 2.5rem } h3 { margin-bottom: 0 }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left }
td:not(:first-child) { white-space: nowrap } th { background: var(--head) }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--pale) }
details td:not(:first-child) { white-space: normal; overflow-wrap: anywhere }
blockquote { margin: 1rem 0; padding: .25rem 1rem; border-left: .25rem solid var(--line); color: var(--pale) }
img { max-width: 100%; height: auto } code { background: var(--head); padding: 0 .2rem }
@media (max-width: 30rem) { th, td { padding: .2rem .35rem; font-size: .8rem } }
"""


@dataclass(frozen=True)
class Folded:
    """Markdown that a reader unfolds by its summary, which is plain text."""

    summary: str
    markdown: str

    def __str__(self) -> str:
        return f"<details><summary>{escape(self.summary)}</summary>\n\n{self.markdown}\n</details>\n"


def escaped(text: object) -> str:
    """Text as a line of markdown that shows it as it is: no character of it is markup, in a table or at the start of a line either."""
    shown = "".join(c if c.isprintable() else "⏎" if c == "\n" else repr(c)[1:-1] for c in str(text))
    shown = re.sub(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", shown)
    return re.sub(r"^(\s*)(?=[-+=#])|^(\s*\d+)(?=[.)](?:\s|$))", r"\1\2\\", shown)


def html_page(title: str, parts: Iterable[str | Folded], pictures: Iterable[Path]) -> str:
    """The HTML of a page; the pictures, to which the markdown refers by their file names, are embedded."""
    # without HTML in markdown: where a part is not escaped, a browser shows its text and does not run it
    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    folded = "<details><summary>{}</summary>\n{}</details>\n"
    shown = [
        folded.format(escape(part.summary), render(part.markdown)) if isinstance(part, Folded) else render(part)
        for part in parts
    ]
    body = "".join(shown)
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        kind = mimetypes.types_map[picture.suffix]
        body = body.replace(f'src="{picture.name}"', f'src="data:{kind};base64,{data}"')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
