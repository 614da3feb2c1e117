"""Paragraphs of a page are what a reader sees as paragraphs, and nothing from around them."""

import pytest

from vlm.records.texts import paragraphs_of

PAGE = """<!DOCTYPE html>
<html lang="zh">
<head>
  <meta charset="utf-8">
  <title>猫 - 百科</title>
  <style>p { color: red } /* <p>not a paragraph</p> */</style>
  <script>if (1 < 2 && 3 > 2) document.write("<p>written</p>");</script>
</head>
<body class="page">
<header><a href="/">首页</a><p>Site header</p></header>
<nav><ul><li>Home</li><li>About<ul><li>Us</li></ul></li></ul></nav>
<main>
  <h1>猫<small>（学名：<i lang="la">Felis catus</i>）</small></h1>
  <p>猫是一种<a href="/animal">小型<b>食肉</b>动物</a>，
     在<em>世界各地</em>都有。</p>
  <!-- <p>a comment</p> -->
  <p>Fish &amp; chips &lt;b&gt; caf&eacute; &#29483;&#x732B;&nbsp;&hellip;
  <p>An unclosed paragraph,<br>broken by hand
  <ul>
    <li>黑猫</li><li>白猫 <span>and <span>nested</span> spans</span>
    <li>H<sub>2</sub>O, updated <time datetime="2024-05-01">1 May</time>, super<wbr>cali
  </ul>
  <table><tr><th>品种</th><td>Siamese</td></tr><tr><td colspan="2"> \t </td></tr></table>
  <p></p><p>   </p>
  <noscript><p>Please enable scripts</p></noscript>
  <blockquote>一<div>二</div>三</blockquote>
</main>
<aside><p>Related pages</p></aside>
<footer><p>© 2024</p></footer>
<script src="end.js"></script>
</body>
</html>
"""

PARAGRAPHS = [
    "猫（学名：Felis catus）",
    "猫是一种小型食肉动物， 在世界各地都有。",
    "Fish & chips <b> café 猫猫 …",
    "An unclosed paragraph,",
    "broken by hand",
    "黑猫",
    "白猫 and nested spans",
    "H2O, updated 1 May, supercali",
    "品种",
    "Siamese",
    "一",
    "二",
    "三",
]


@pytest.fixture
def read(tmp_path):
    def paragraphs(page):
        (tmp_path / "a.html").write_text(page, encoding="utf-8")
        return [text for _, text in paragraphs_of(tmp_path / "a.html")]

    return paragraphs


def test_the_paragraphs_of_a_page_are_those_that_its_reader_sees(read):
    assert read(PAGE) == PARAGRAPHS


@pytest.mark.parametrize("tag", ["a", "b", "del", "em", "font", "i", "ins", "span", "sup", "time"])
def test_a_tag_within_a_sentence_does_not_break_it(read, tag):
    page = f"<p>one t<{tag}>w</{tag}>o <{tag}>three</{tag}></p>"
    assert read(page) == ["one two three"]


@pytest.mark.parametrize("tag", ["article", "br", "dd", "div", "h2", "hr", "li", "p", "section"])
def test_a_tag_between_paragraphs_parts_them(read, tag):
    assert read(f"one<{tag}>two") == ["one", "two"]


@pytest.mark.parametrize(
    "tag", ["aside", "footer", "header", "nav", "noscript", "script", "style", "template", "title"]
)
def test_what_is_around_the_text_is_left_out(read, tag):
    page = f"<p>one</p><{tag} id='x'>left out</{tag}><p>two</p>"
    assert read(page) == ["one", "two"]


def test_text_after_nested_navigation_is_not_lost(read):
    page = "<nav>a<nav>b</nav>c</nav><p>one</p></nav><p>two</p>"
    assert read(page) == ["one", "two"]


def test_a_page_may_leave_out_the_tags_that_html_lets_it_leave_out(read):
    page = "<!doctype html><html><head><meta charset=utf-8><title>t</title><body><p>one<p>two"
    assert read(page) == ["one", "two"]
    assert read("<title>t</title><p>one<p>two") == ["one", "two"]


@pytest.mark.parametrize(
    ("page", "paragraphs"),
    [
        ("", []),
        (" \n ", []),
        ("<p><br></p>", []),
        ("只有文字", ["只有文字"]),
        ("a < b & c", ["a < b & c"]),
        ("<p>&lt;script&gt; is a word", ["<script> is a word"]),
        ("<p>cut <b>off", ["cut off"]),
    ],
    ids=["nothing", "space", "tags alone", "no tag", "bare signs", "an escaped tag", "cut off"],
)
def test_a_page_of_any_kind_is_read(read, page, paragraphs):
    assert read(page) == paragraphs
