"""Turns markdown into one self-contained HTML page, with its pictures embedded."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { color: #1f4e8c } table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
th, td { border: 1px solid #ccd; padding: .25rem .6rem; text-align: left } th { background: #eef3fa }
td:not(:first-child) { font-variant-numeric: tabular-nums } code { background: #f3f3f6; padding: 0 .2rem }
"""


def html_page(title: str, markdown: str, pictures: Iterable[Path]) -> str:
    """The HTML of a page; the pictures, to which the markdown refers by their file names, are embedded."""
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{data}"')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'
