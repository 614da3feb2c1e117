"""Templates are texts with a place for a name, in both languages, shipped or of a file."""

import pytest

from vlm.errors import DataError
from vlm.evaluation.classification.prompts import prompts_of, read_templates


@pytest.mark.parametrize("name", ["general", "drawings", "name"])
def test_shipped_sets_speak_both_languages(name):
    templates = read_templates(name, ["zh", "en"])
    assert list(templates) == ["zh", "en"]
    assert len(templates["zh"]) == len(templates["en"])
    assert {"{}"} <= set(templates["zh"]) & set(templates["en"])
    for language, texts in templates.items():
        assert len(set(texts)) == len(texts)
        assert all(text.count("{}") == 1 for text in texts)
        assert all(
            text == "{}" or any("一" <= letter <= "鿿" for letter in text) == (language == "zh")
            for text in texts
        )


def test_the_general_and_the_drawings_sets_are_ensembles():
    assert len(read_templates("general", ["zh"])["zh"]) == 18
    assert len(read_templates("drawings", ["en"])["en"]) == 12


def test_every_name_goes_into_every_template():
    assert prompts_of(["cat", "kitten"], ["{}", "a photo of a {}"]) == [
        "cat", "a photo of a cat", "kitten", "a photo of a kitten",
    ]  # fmt: skip
    assert prompts_of("猫", ["{}的照片"]) == ["猫的照片"]


@pytest.mark.parametrize(
    ("template", "name", "prompt"),
    [
        ("a photo of a {}", "a face", "a photo of a face"),
        ("The {} again", "some rice", "some rice again"),
        ("a drawing of {}", "an arrow", "a drawing of an arrow"),
        ("a photo of a {}", "apple", "a photo of a apple"),
        ("a photo of a {}", "android", "a photo of a android"),
        ("a photo of a big {}", "a face", "a photo of a big a face"),
        ("a {c}, the {c}", "a dog", "a dog, a dog"),
        ("{} \\1", "a\\1b", "a\\1b \\1"),
    ],
)
def test_an_article_of_the_name_takes_the_place_of_the_templates(template, name, prompt):
    assert prompts_of(name, [template]) == [prompt]


@pytest.mark.parametrize("file", ["templates.yaml", "templates.json"])
def test_templates_of_a_file_are_read(tmp_path, file):
    path = tmp_path / file
    path.write_text('{"zh": ["{}图"], "en": ["see {c}", "{}"], "fr": ["{}"]}', encoding="utf-8")
    assert read_templates(str(path), ["en", "zh"]) == {"en": ("see {c}", "{}"), "zh": ("{}图",)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a list", "are not lists by language"),
        ('{"zh": ["{}"], "fr": ["{}"]}', "are not in en; their languages are zh, fr$"),
        ('{"en": []}', "are not in en; their languages are none$"),
        ('{"en": "{}"}', r"in 'en' are '\{\}'; expected a list"),
        (
            '{"en": ["no place"]}',
            r"'no place' in the templates .* is not a template; expected \{\}",
        ),
        ('{"en": [3]}', "3 in the templates"),
        ('{\n"a": [', r"cannot read the templates \S*templates\.yaml: [^\n]+$"),
    ],
    ids=["list", "language missing", "empty", "text", "no place", "number", "damaged"],
)
def test_what_is_no_template_is_refused(tmp_path, text, said):
    path = tmp_path / "templates.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_templates(str(path), ["en"])


def test_an_unknown_set_is_refused_with_those_there_are():
    with pytest.raises(DataError, match=r"no templates 'photos'; expected general, drawings, name"):
        read_templates("photos", ["en"])
