"""The page: well-formed, self-contained, every text escaped, written whole or not at all."""

from __future__ import annotations

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cli.errors import UserError
from evaluation.page import Code, Facts, Heading, Picture, Table, Text, anchor, is_number, page_html, write_page

PNG = b"\x89PNG\r\n\x1a\n and so on"
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'
VOID = {"meta", "img"}


class Tree(HTMLParser):
    """Reads a page: (tag, attributes) of its elements, its text by tag; what is not closed in turn is an error."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


SECTIONS = [
    Text("First.\n\nSecond."),
    Heading("Results"),
    Table(("method", "AUROC", "n"), [("MSP", "95.64", "1,208"), ("CMG", "98.06 ± 0.03", "-")], "In per cent."),
    Heading("Pictures"),
    Picture(PNG, "a picture", "What it shows."),
    Picture(SVG, "a drawing"),
    Heading("How this was made"),
    Code("python -m eval\npython -m reproduce"),
    Facts({"hardware": "2 cores", "seeds": 3}),
]


def test_a_page_holds_what_it_was_given():
    page = page_html("CMG", SECTIONS)
    tree = Tree(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert tree.all("html") == [{"lang": "en"}] and tree.all("meta")[0] == {"charset": "utf-8"}
    assert tree.all("meta")[1] == {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert tree.texts["title"] == tree.texts["h1"] == ["CMG"]
    assert tree.texts["p"] == ["First.", "Second."]
    assert tree.texts["th"] == ["method", "AUROC", "n"] and tree.texts["caption"] == ["In per cent."]
    assert tree.texts["td"] == ["MSP", "95.64", "1,208", "CMG", "98.06 ± 0.03", "-"]
    assert [cell.get("class") for cell in tree.all("td")] == [None, "number", "number"] * 2
    assert [cell.get("class") for cell in tree.all("th")] == [None, "number", "number"]
    assert tree.texts["figcaption"] == ["What it shows."]
    assert tree.texts["code"] == ["python -m eval\npython -m reproduce"]
    assert tree.texts["dt"] == ["hardware", "seeds"] and tree.texts["dd"] == ["2 cores", "3"]
    assert "prefers-color-scheme: dark" in tree.texts["style"][0]


def test_contents_lead_to_the_headings():
    tree = Tree(page_html("CMG", SECTIONS))
    assert [link["href"] for link in tree.all("a")] == ["#results", "#pictures", "#how-this-was-made"]
    assert [f"#{heading['id']}" for heading in tree.all("h2")] == [link["href"] for link in tree.all("a")]
    assert not Tree(page_html("CMG", SECTIONS[:4])).all("a")  # two headings need no list
    assert anchor("CMG-energy: σ = 3 & more") == "cmg-energy-σ-3-more" and anchor("±") == "section"
    with pytest.raises(ValueError, match="two headings are alike: Results, results!"):
        page_html("CMG", [Heading("Results"), Heading("results!")])


def test_a_page_needs_nothing_from_elsewhere():
    page = page_html("CMG", SECTIONS)
    tree = Tree(page)
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert not {tag for tag, _ in tree.elements} & {"script", "link", "iframe", "object", "base"}
    kinds, contents = zip(*(image["src"].split(";base64,") for image in tree.all("img")), strict=True)
    assert kinds == ("data:image/png", "data:image/svg+xml")
    assert [b64decode(content) for content in contents] == [PNG, SVG]
    assert [image["alt"] for image in tree.all("img")] == ["a picture", "a drawing"]


def test_every_text_is_escaped():
    evil = "\"'><script>alert('&amp;')</script>"
    sections = [
        Heading(evil),
        Heading("b"),
        Heading("c"),
        Text(evil),
        Code(evil),
        Facts({evil: evil}),
        Table((evil,), [(evil,)], evil),
        Picture(SVG, evil, evil),
    ]
    page = page_html(evil, sections)
    tree = Tree(page)
    assert "<script" not in page and not tree.all("script")
    for tag in ("title", "h1", "p", "code", "dt", "dd", "th", "td", "caption", "figcaption"):
        assert tree.texts[tag] == [evil]
    assert tree.texts["h2"][0] == tree.texts["a"][0] == tree.all("img")[0]["alt"] == evil
    assert tree.all("h2")[0]["id"] == "script-alert-amp-script"


@pytest.mark.parametrize("cell", ["97.12", "80.61 ± 0.93", "-1.5", "−3", "1,208.8 s", "4.6 %", "", "-", "< 0.01", "±2"])
def test_numbers(cell):
    assert is_number(cell)


@pytest.mark.parametrize("cell", ["MSP", "held-out", "--", "n = 3", "step 5", "max"])
def test_words(cell):
    assert not is_number(cell)


def test_tables_of_no_rows_and_of_uneven_ones():
    tree = Tree(page_html("CMG", [Table(("a", "b"), [])]))
    assert tree.texts["th"] == ["a", "b"] and not tree.all("td") and not tree.all("caption")
    for rows in ([("1",)], [("1", "2", "3")], [("1", "2"), ("1",)]):
        with pytest.raises(ValueError, match="shorter|longer"):
            page_html("CMG", [Table(("a", "b"), rows)])


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="a picture is neither PNG nor SVG"):
        page_html("CMG", [Picture(b"\xff\xd8\xff JPEG", "a photograph")])


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "page.html"
    write_page(path, "CMG ± \udcff", SECTIONS)
    assert path.read_text(encoding="utf-8") == page_html("CMG ± ?", SECTIONS)
    with pytest.raises(ValueError, match="neither PNG nor SVG"):
        write_page(path, "CMG", [Picture(b"", "nothing")])
    assert path.read_text(encoding="utf-8") == page_html("CMG ± ?", SECTIONS)
    with pytest.raises(UserError, match=r"cannot write .*page.html/page.html: "):
        write_page(path / "page.html", "CMG", SECTIONS)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write .*page.html: No space left on device"):
        write_page(path, "CMG", SECTIONS)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["page.html"]
