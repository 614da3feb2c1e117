"""A document in Markdown says what it holds, and is written with its files."""

import re
from html import unescape

import pytest
from markdown_it import MarkdownIt

from tests.builders import encoded, make_image
from vlm.errors import ConfigError, DataError, VlmError
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
    as_markdown,
    score_cell,
    write_report,
)
from vlm.reports.examples import Answer, Example, Found

PLOT = encoded(make_image(3))
HOSTILE = [
    "<script>alert(1)</script>", "<b>bold</b> & <!-- no comment -->", "&lt; &amp; &#39;",
    "a < b > c", "*stars* **two** * one", "_under_ __two__ snake_case_name _a",
    "[link](https://example.org)", "![image](x.png)", "[a][b] [c]: d", "# no heading",
    "## no heading", "- no item", "+ no item", "1. no item", "12) no item", "> no quote",
    ">quote", "---", "===", "***", "~~struck~~", "$x$ $$", "a | b", "back\\slash \\* \\`",
    "one ` backtick", '"quotes" and it\'s', "`` two", "-5 degrees", "https://example.org/a_b_c",
    "红色的*花*", "C#", "ends with \\",
]  # fmt: skip


def document(*blocks, summary=()):
    return Document(
        title="Report", summary=summary, sections=[Section(title="Part", blocks=blocks)]
    )


def examples(*, image=PLOT):
    found = [Found(image=image, correct=True, cosine=0.5)]
    answer = Answer(language="en", query="a cat", found=found, rank=1)
    return Examples(title="What it finds", examples=[Example(answers=[answer])])


def rendered(markdown: str) -> str:
    """Return the page that another project makes of Markdown as GitHub reads it."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)


def test_every_block_has_its_markdown():
    markdown = as_markdown(
        Document(
            title="Report",
            summary=[Paragraph("It ran\n  on `two cores`.")],
            sections=[
                Section(
                    title="Scores",
                    blocks=[
                        Table(header=["name", "R@1"], rows=[["猫", "0.5"]], caption="All of them"),
                        Bullets(["one", "two"]),
                    ],
                ),
                Section(
                    title="More",
                    blocks=[
                        Figure(name="the plot.png", content=PLOT, alt="recall [%]"),
                        CodeBlock("vlm search\n  --k 1\n"),
                        examples(),
                    ],
                ),
            ],
        )
    )
    assert markdown == (
        "# Report\n\nIt ran on `two cores`.\n\n"
        "## Scores\n\nAll of them\n\n| name | R@1 |\n| ---- | --: |\n| 猫   | 0.5 |\n\n"
        "* one\n* two\n\n"
        "## More\n\n![recall \\[%\\]](the%20plot.png)\n\n"
        "```\nvlm search\n  --k 1\n```\n\n"
        "### What it finds\n\nThe HTML page shows these examples.\n"
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is_in_every_block(text):
    table = Table(header=["first", text], rows=[["1", "2"], [text, "3"]], text_columns=2)
    page = rendered(
        as_markdown(
            Document(
                title="Report",
                summary=[Paragraph(text), Bullets([text, "second"]), table],
                sections=[Section(title=f"About {text}", blocks=[])],
            )
        )
    )
    shown = [unescape(found) for found in re.findall(r"<(?:p|li|h2|th|td)>([^<]*)</", page)]
    assert shown == [
        text, text, "second", "first", text, "1", "2", text, "3", f"About {text}",
    ]  # fmt: skip


def test_code_in_backticks_is_code_whatever_it_holds():
    page = rendered(as_markdown(document(Paragraph("see `<b>*x*_y_|z</b>` and `红`"))))
    assert "<p>see <code>&lt;b&gt;*x*_y_|z&lt;/b&gt;</code> and <code>红</code></p>" in page


@pytest.mark.parametrize("text", ["```\ninner\n```", "````", "a ` b", "<b>&amp;</b>"])
def test_a_code_block_shows_its_lines_as_they_are(text):
    page = rendered(as_markdown(document(CodeBlock(text), Paragraph("after"))))
    found = re.search("<pre><code>(.*)\n</code></pre>\n<p>after</p>", page, re.DOTALL)
    assert unescape(found[1]) == text


def test_an_image_is_found_under_any_name_and_text():
    figure = Figure(name="红 (1).png", content=PLOT, alt="a] *b* [c <i>&amp; `d`")
    page = rendered(as_markdown(document(figure)))
    source, alt = re.search('<img src="([^"]*)" alt="([^"]*)"', page).groups()
    assert source == "%E7%BA%A2%20%281%29.png"
    assert unescape(alt) == "a] *b* [c <i>&amp; `d`"


def test_half_characters_are_replaced(tmp_path):
    page = write_report(tmp_path, document(Paragraph("a\ud83db\x00")))
    assert "a�b�" in page.read_text(encoding="utf-8")
    assert "a�b�" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_a_report_is_written_with_all_its_files(tmp_path):
    figure = Figure(name="plot.png", content=PLOT, alt="plot")
    whole = document(examples(), summary=[figure])
    page = write_report(tmp_path / "a" / "b", whole, name="scores")
    assert page == tmp_path / "a" / "b" / "scores.html"
    files = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert files == {
        "plot.png": PLOT,
        "scores.md": as_markdown(whole).encode(),
        "scores.html": as_html(whole).encode(),
    }
    for name in re.findall(r"\]\(([^)]*)\)", as_markdown(whole)):
        assert name in files


def test_the_same_document_is_written_the_same(tmp_path):
    pages = [write_report(tmp_path / name, document(examples())) for name in ("a", "b")]
    for path in pages[0].parent.iterdir():
        assert path.read_bytes() == (pages[1].parent / path.name).read_bytes()


def test_two_figures_of_one_name_are_refused(tmp_path):
    figure = Figure(name="plot.png", content=PLOT, alt="plot")
    with pytest.raises(ConfigError, match=r"two figures of a report are named plot\.png"):
        write_report(tmp_path, document(figure, summary=[figure]))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_image_leaves_no_report(tmp_path):
    with pytest.raises(DataError, match="the image is not one of"):
        write_report(tmp_path, document(examples(image=b"nothing")))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VlmError, match=r"cannot write .*file"):
        write_report(tmp_path / "file", document())


@pytest.mark.parametrize("name", ["../plot.png", "a/b.png", "plot", "plot.jpg", ".png", ""])
def test_a_figure_needs_a_plain_file_name(name):
    with pytest.raises(ConfigError, match=r"expected a file name that ends in \.png"):
        Figure(name=name, content=PLOT, alt="plot")


def test_a_score_with_an_interval_shows_half_its_width():
    assert score_cell(0.25, (0.2, 0.31)) == "0.250 ±0.055"
    assert score_cell(0.5) == "0.500"
