"""A report as one HTML file: text, tables and pictures, all inside it. It opens without a network and needs no script.

    write_page(path, "CMG on MNIST", [Heading("Results"), Table(("method", "AUROC"), rows), Picture(svg, alt, caption)])

Every text is escaped: what comes from names of files or data sets cannot become markup.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from cli.files import replacing

# --- what a page is made of ---------------------------------------------------------------------


class Section(Protocol):
    """A piece of a page."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class Heading:
    """The title of what follows. From three headings on the page begins with a list of them."""

    text: str

    def html(self) -> str:
        return f'<h2 id="{anchor(self.text)}">{escape(self.text)}</h2>'


@dataclass(frozen=True)
class Text:
    """Paragraphs, with an empty line between two."""

    text: str

    def html(self) -> str:
        return "\n".join("<p>" + escape(part).replace("\n", "<br>\n") + "</p>" for part in self.text.split("\n\n"))


@dataclass(frozen=True)
class Code:
    """Commands, one a line; a long one is wrapped."""

    text: str

    def html(self) -> str:
        return f"<pre><code>{escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Facts:
    """Names and values: the command, the hardware, versions, the date."""

    values: Mapping[str, object]

    def html(self) -> str:
        pairs = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in self.values.items())
        return "<dl>\n" + "\n".join(pairs) + "\n</dl>"


@dataclass(frozen=True)
class Table:
    """Rows under a header that stays in sight; columns of numbers are set to the right.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def html(self) -> str:
        numeric = [all(map(is_number, column)) for column in zip(*self.rows, strict=True)]
        kinds = [' class="number"' if number else "" for number in numeric or [False] * len(self.header)]

        def line(cells: Sequence[str], tag: str) -> str:
            marked = (f"<{tag}{kind}>{escape(cell)}</{tag[:2]}>" for cell, kind in zip(cells, kinds, strict=True))
            return f"<tr>{''.join(marked)}</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>\n" if self.caption else ""
        head = line(self.header, 'th scope="col"')
        body = "\n".join(line(row, "td") for row in self.rows)
        table = f"<table>\n{caption}<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        return f'<div class="scroll" tabindex="0">\n{table}\n</div>'


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG file, as bytes, with the words that stand for it where it cannot be seen, and a caption.

    Raises:
        ValueError: the bytes are neither PNG nor SVG.
    """

    content: bytes
    alt: str
    caption: str = ""

    def html(self) -> str:
        source = f"data:{media_type(self.content)};base64,{b64encode(self.content).decode()}"
        caption = f"\n<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        image = f'<img src="{source}" alt="{escape(self.alt)}">'
        return f"<figure>\n{image}{caption}\n</figure>"


def anchor(text: str) -> str:
    """The name by which a link finds a heading: its letters and digits in lower case, "-" for the rest."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) or "section"


def is_number(cell: str) -> bool:
    """Whether a cell is a number, as "97.12", "80.61 ± 0.93", "1,208.8 s", or stands for none: "" or a dash."""
    return cell in ("", "-") or cell.lstrip("+-−±≈<> ")[:1].isdigit()


def media_type(content: bytes) -> str:
    """Of a picture, from how it begins."""
    if content.startswith(b"\x89PNG\r\n"):
        return "image/png"
    if b"<svg" in content[:1000]:
        return "image/svg+xml"
    raise ValueError("a picture is neither PNG nor SVG")


# --- the page -----------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --ink: #222; --soft: #5f5f5f; --line: #d9d9d9; --ground: #fff; --panel: #f5f5f5;
  --link: #0065a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --line: #444; --ground: #17181a; --panel: #232528; --link: #74bcec; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.8rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 0.75rem; font-size: 1.3rem; line-height: 1.3; }
p { margin: 0 0 1rem; max-width: 44rem; }
a { color: var(--link); }
nav ul { margin: 0 0 1rem; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
pre { margin: 0 0 1rem; padding: 0.75rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  border-radius: 6px; background: var(--panel); font-size: 0.85rem; line-height: 1.5; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scroll { max-height: 85vh; overflow: auto; }
.scroll + p { margin-top: 0.8rem; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption, figcaption { color: var(--soft); font-size: 0.9rem; line-height: 1.45; text-align: left; }
caption { padding-bottom: 0.5rem; }
th, td { padding: 0.35rem 0.7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--ground); box-shadow: inset 0 -1px var(--soft); font-weight: 600; }
:is(th, td):first-child { padding-left: 0; }
.number { text-align: right; }
figure { margin: 1.5rem 0 2rem; max-width: 44rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption { margin-top: 0.6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.25rem; margin: 0 0 1rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  table { font-size: 0.85rem; }
  th, td { padding: 0.3rem 0.45rem; }
  img { width: 100vw; margin: 0 -1.25rem; border-radius: 0; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.6rem; }
}
@media print { .scroll { max-height: none; overflow: visible; } figure, tr { break-inside: avoid; } }
"""


def page_html(title: str, sections: Sequence[Section]) -> str:
    """The whole page as text. Raises `ValueError` when two headings are alike, so that a link could not find one."""
    headings = [section.text for section in sections if isinstance(section, Heading)]
    if len({anchor(text) for text in headings}) < len(headings):
        raise ValueError(f"two headings are alike: {', '.join(headings)}")
    links = "\n".join(f'<li><a href="#{anchor(text)}">{escape(text)}</a></li>' for text in headings)
    contents = f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>\n' if len(headings) > 2 else ""
    body = "\n".join(section.html() for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{contents}{body}
</main>
</body>
</html>
"""


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all. Raises `UserError` when it cannot be written."""
    content = page_html(title, sections).encode(errors="replace")  # names of files may hold what is no text
    with replacing(path) as temporary:
        temporary.write_bytes(content)
