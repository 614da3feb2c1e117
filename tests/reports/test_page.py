"""The page is well-formed, needs nothing else, and shows texts and images as what they are."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree.ElementTree import TreeBuilder

import numpy as np
import pytest
from PIL import Image

from tests.builders import encoded, make_image
from vlm.errors import DataError
from vlm.reports.document import (
    Bullets,
    CodeBlock,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    Table,
    as_html,
    thumbnail,
)
from vlm.reports.examples import Answer, Example, Found

IMAGE = encoded(make_image(0, size=(200, 100)))
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></p></body>",
    "&lt;b&gt;", "it's \"quoted\" & more", "javascript:alert(1)", "<!-- -->", "]]>",
]  # fmt: skip


class Reader(HTMLParser):
    """Builds a tree, as strict as XML is."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute of {tag} is there twice"
        self.builder.start(tag, dict(attributes))
        if tag in ("img", "meta"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)


def read(*blocks, title="Report", summary=(), sections=None):
    sections = [Section(title="Part", blocks=blocks)] if sections is None else sections
    page = as_html(Document(title=title, summary=summary, sections=sections))
    assert page.startswith("<!DOCTYPE html>\n")
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader.builder.close()


def text_of(node):
    return "".join(node.itertext())


def texts(root, path):
    return [text_of(node) for node in root.findall(path)]


def asking(query, *correct, language="en", rank=None):
    found = [Found(image=IMAGE, correct=each, cosine=0.5) for each in correct]
    return Answer(language=language, query=query, found=found, rank=rank)


def finding(*texts, language="en", rank=None):
    found = [Found(text=text, correct=text == texts[0], cosine=-0.25) for text in texts]
    return Answer(language=language, what="caption", found=found, rank=rank)


def examples(*items):
    return Examples(title="What it finds", examples=items)


def test_every_block_has_its_elements():
    root = read(
        Paragraph("It ran on `two cores`."),
        Bullets(["one", "two `2`"]),
        Table(
            header=["name", "kind", "R@1"], rows=[["cat", "a", "0.5"], ["dog", "b", "1"]],
            text_columns=2, caption="All of them",
        ),
        Figure(name="plot.png", content=IMAGE, alt="recall"),
        CodeBlock("vlm search\n  --k 1\n"),
        title="The `report`",
        summary=[Paragraph("In short.")],
    )  # fmt: skip
    assert texts(root, "head/title") == ["The report"]
    assert texts(root, ".//header/*") == ["The report", "In short."]
    assert texts(root, ".//h1/code") == ["report"]
    assert texts(root, ".//section/h2") == ["Part"]
    assert texts(root, ".//section/p") == ["It ran on two cores."]
    assert texts(root, ".//section/p/code") == ["two cores"]
    assert texts(root, ".//section/ul/li") == ["one", "two 2"]
    assert texts(root, ".//table/caption") == ["All of them"]
    assert texts(root, ".//thead/tr/th") == ["name", "kind", "R@1"]
    assert [texts(row, "td") for row in root.findall(".//tbody/tr")] == [
        ["cat", "a", "0.5"], ["dog", "b", "1"],
    ]  # fmt: skip
    assert texts(root, ".//*[@class='number']") == ["R@1", "0.5", "1"]
    assert texts(root, ".//pre/code") == ["vlm search\n  --k 1"]
    figure = root.find(".//figure/img")
    assert figure.get("alt") == "recall"
    assert figure.get("src") == f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_is_never_mark_up(text):
    section = Section(
        title=text,
        blocks=[
            Paragraph(text),
            Bullets([text]),
            Table(header=[text], rows=[[text]], caption=text),
            Figure(name="plot.png", content=IMAGE, alt=text),
            CodeBlock(text),
            Examples(
                title=text,
                examples=[
                    Example(answers=[asking(text, True, language=text)]),
                    Example(image=Found(image=IMAGE), answers=[finding(text, language=text)]),
                ],
            ),
        ],
    )
    root = read(title=text, summary=[Paragraph(text)], sections=[section] * 3)
    tags = {node.tag for node in root.iter()}
    assert not tags & {"script", "iframe", "object", "link", "form"}
    for path in ("head/title", ".//h1", ".//header/p"):
        assert texts(root, path) == [text], path
    for path in (
        "h2", "h3", "ul/li", "th", "td", "caption", "pre/code", "p[@class='query']",
        "ol[@class='texts']/li/span/span",
    ):  # fmt: skip
        assert texts(root, f".//section//{path}") == [text] * 3, path
    assert texts(root, ".//section/p") == [text] * 3
    assert [image.get("alt") for image in root.findall(".//section/figure/img")] == [text] * 3
    assert not [name for node in root.iter() for name in node.attrib if name.startswith("on")]


def test_the_page_needs_nothing_else_and_forbids_it():
    figure = Figure(name="a.png", content=IMAGE, alt="a")
    root = read(figure, examples(Example(answers=[asking("https://example.org", True)])))
    for node in root.iter():
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert node.get(name, "data:image/").startswith(("data:image/", "#"))
    style = text_of(root.find("head/style"))
    assert "@import" not in style
    assert "url(" not in style
    policy = root.find("head/meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_is_for_phones_dark_screens_and_paper():
    root = read()
    assert root.get("lang") == "en"
    assert "width=device-width" in root.find("head/meta[@name='viewport']").get("content")
    style = text_of(root.find("head/style"))
    for part in ("prefers-color-scheme: dark", "@media print", "overflow-x: auto", "PingFang SC"):
        assert part in style
    assert style.count("{") == style.count("}")
    used = {
        kind
        for node in read(
            Table(header=["a", "b"], rows=[]),
            examples(
                Example(answers=[asking("q", True)], missed=Found(image=IMAGE)),
                Example(image=Found(image=IMAGE), answers=[finding("a", rank=1)]),
            ),
        ).iter()
        for kind in node.get("class", "").split()
    }
    styled = set(re.findall(r"\.([a-z]+)", re.sub(r"\{[^{}]*\}", "", style)))
    assert styled <= used


def test_chinese_within_other_text_is_marked_as_chinese():
    root = read(Paragraph("the query 一只猫，两只狗。 finds `红色` first"))
    assert texts(root, ".//section/p") == ["the query 一只猫，两只狗。 finds 红色 first"]
    assert texts(root, ".//section/p//*[@lang='zh']") == ["一只猫，两只狗。", "红色"]


def test_an_example_shows_each_language_its_rank_and_what_is_correct_in_words_too():
    root = read(
        examples(
            Example(
                answers=[
                    asking("红苹果", False, True, language="zh", rank=2),
                    asking("red apple", False, rank=1204),
                ],
                missed=Found(image=IMAGE),
            ),
            Example(answers=[asking("free", False)]),
        )
    )
    first, free = root.findall(".//article")
    assert [(p.get("lang"), text_of(p)) for p in first.findall(".//p[@class='query']")] == [
        ("zh", "红苹果"), ("en", "red apple"),
    ]  # fmt: skip
    assert texts(first, ".//p[@class='rank']") == [
        "first correct image at rank 2", "first correct image at rank 1,204",
    ]  # fmt: skip
    assert texts(free, ".//p[@class='rank']") == []
    zh, en = first.findall(".//ol")
    assert [li.get("class") for li in zh] == ["other", "correct"]
    assert texts(zh, "li/small") == ["0.500", "✓ 0.500"]
    assert [image.get("alt") for image in zh.iter("img")] == [
        "image at rank 1", "image at rank 2, correct",
    ]  # fmt: skip
    assert texts(en, "li/small") == ["0.500"]
    assert texts(first, "figure/figcaption") == ["a correct image"]
    assert first.find("figure/img").get("alt") == "a correct image"
    assert free.find("figure") is None


def test_captions_stand_next_to_their_image_with_their_language():
    answers = [finding("一只猫", "一条狗", language="zh", rank=1), finding("a cat", rank=3)]
    root = read(examples(Example(image=Found(image=IMAGE), answers=answers)))
    assert root.find(".//article/img").get("alt") == "the query image"
    zh, en = root.findall(".//article/div")
    assert texts(zh, "div/p") == ["zh", "first correct caption at rank 1"]
    assert texts(en, "div/p") == ["en", "first correct caption at rank 3"]
    assert [text_of(li) for li in zh.findall("ol/li")] == ["✓ 一只猫-0.250", "一条狗-0.250"]
    assert [span.get("lang") for span in zh.findall("ol/li/span/span")] == ["zh", "zh"]
    assert [li.get("class") for li in zh.findall("ol/li")] == ["correct", "other"]


def test_thumbnails_are_small_webp_of_the_right_content():
    root = read(examples(Example(answers=[asking("q", True)])))
    kind, _, content = root.find(".//article//img").get("src").partition(",")
    assert kind == "data:image/webp;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert (shown.format, shown.size) == ("WEBP", (96, 48))
    expected = np.asarray(make_image(0, size=(200, 100)).resize((96, 48)), np.float64)
    assert np.abs(np.asarray(shown.convert("RGB"), np.float64) - expected).mean() < 8


@pytest.mark.parametrize(
    ("size", "expected"), [((30, 300), (10, 96)), ((20, 10), (20, 10)), ((2000, 1), (96, 1))]
)
def test_a_thumbnail_keeps_the_shape_and_is_never_larger_than_the_image(size, expected):
    assert Image.open(io.BytesIO(thumbnail(make_image(1, size=size)))).size == expected


def test_transparency_is_white():
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    small = Image.open(io.BytesIO(thumbnail(encoded(clear))))
    assert np.asarray(small.convert("RGB")).min() == 255


def test_the_address_of_an_image_is_its_title():
    first, second = (Found(image=IMAGE, text=text) for text in ("a/b.tar#7", ""))
    answer = Answer(language="en", query="q", found=[first, second])
    root = read(examples(Example(answers=[answer], missed=first), Example(image=first, answers=[])))
    titles = [image.get("title") for image in root.findall(".//article//img")]
    assert titles == ["a/b.tar#7", None, "a/b.tar#7", "a/b.tar#7"]


def test_half_characters_and_control_characters_are_replaced():
    assert texts(read(Paragraph("a\ud83db\x00\x1b\ufffe")), ".//section/p") == ["a�b���"]


def test_a_damaged_image_is_refused():
    with pytest.raises(DataError, match="not one of JPEG, PNG, WEBP"):
        thumbnail(b"<svg/>")


def test_a_page_of_many_examples_stays_small():
    answers = [asking(query, *[False] * 5) for query in ("猫", "cat")]
    page = as_html(
        Document(title="t", summary=[examples(*[Example(answers=answers)] * 12)], sections=[])
    )
    assert page.count("<img ") == 120
    assert len(page) < 500_000
