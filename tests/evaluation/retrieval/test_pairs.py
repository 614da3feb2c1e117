"""A benchmark asks once for each concept and knows all its images."""

import json

import numpy as np
import pytest

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_sample,
    make_samples,
    of_split,
    write_split,
)
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import DataError
from vlm.evaluation.retrieval.pairs import (
    correct_pairs,
    linked_groups,
    pairs_of_split,
    translations_of,
)


def pairs_of(folder, samples, *, languages=("zh", "en"), where=()):
    write_split(folder, samples, split="test")
    return pairs_of_split(of_split(folder, "test", where=where), languages=languages)


def test_each_concept_is_asked_for_once_and_all_its_images_are_answers(data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    assert list(pairs.texts) == ["zh", "en"]
    assert list(pairs.texts["en"].texts) == [en for en, _ in THINGS]
    assert list(pairs.texts["zh"].texts) == [zh for _, zh in THINGS]
    for of_language in pairs.texts.values():
        found = {tuple(match) for match in of_language.matches.tolist()}
        assert found == {(number % 12, number) for number in range(24)}
        assert len(of_language.matches) == 24
    assert list(pairs.images) == [sample.image for sample in make_samples(24)]


def test_a_concept_without_a_language_is_not_asked_for_in_it(tmp_path):
    samples = [
        make_sample(0, captions={"zh": ["甲"]}, concept="a"),
        make_sample(1, captions={"en": ["b"], "zh": ["乙"]}, concept="b"),
        make_sample(2, captions={"en": ["a"]}, concept="a"),
    ]
    pairs = pairs_of(tmp_path, samples)
    assert len(pairs.images) == 3
    assert list(pairs.texts["zh"].texts) == ["甲", "乙"]
    assert pairs.texts["zh"].matches.tolist() == [[0, 0], [1, 1]]
    assert list(pairs.texts["en"].texts) == ["b", "a"]
    assert pairs.texts["en"].matches.tolist() == [[0, 1], [1, 2]]


def test_a_language_that_no_sample_has_is_left_out(tmp_path):
    pairs = pairs_of(tmp_path, make_samples(2), languages=["fr", "en"])
    assert list(pairs.texts) == ["en"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((), range(24)),
        (("source=photo",), range(12, 24)),
        (("source!=photo",), range(12)),
        (("group=even",), range(0, 24, 2)),
        (("group!=even", "source=photo"), range(13, 24, 2)),
        (("concept=thing-3",), (3, 15)),
    ],
    ids=lambda value: " and ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_conditions_choose_samples(data_folder, where, expected):
    pairs = pairs_of_split(of_split(data_folder, "test", where=where), languages=["en"])
    assert list(pairs.images) == [encoded(make_image(number)) for number in expected]
    matches = pairs.texts["en"].matches
    assert sorted(matches[:, 1].tolist()) == list(range(len(pairs.images)))


def test_a_condition_on_what_no_sample_has_is_refused(data_folder):
    with pytest.raises(DataError, match=r"no sample of the split 'test' .* has 'grop', .* group"):
        pairs_of_split(of_split(data_folder, "test", where=["grop!=even"]), languages=["en"])


def test_conditions_that_leave_nothing_are_named(data_folder):
    with pytest.raises(DataError, match=r"'test' .* has no sample where source=oil and group=even"):
        pairs_of_split(
            of_split(data_folder, "test", where=["source=oil", "group=even"]),
            languages=["zh", "en"],
        )


def test_languages_that_leave_nothing_are_named(data_folder):
    with pytest.raises(
        DataError, match=r"no sample with a caption in fr; expected some of \w\w, \w\w$"
    ):
        pairs_of_split(of_split(data_folder, "test"), languages=["fr"])


def test_matches_are_whole_numbers_in_pairs(data_folder):
    matches = pairs_of_split(of_split(data_folder, "test"), languages=["en"]).texts["en"].matches
    assert matches.dtype == np.int64
    assert matches.shape == (24, 2)


def benchmark(tmp_path, **settings):
    lines = [
        {"image": "0.png", "caption": ["A Cat", "“the same”"]},
        {"image": "1.png", "caption": ["“the same”"]},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
    return opened(tmp_path / "test.jsonl", **settings)


def test_a_benchmarks_files_become_questions(tmp_path):
    pairs = benchmark(tmp_path)
    texts = pairs.texts["en"]
    assert list(texts.texts) == ["A Cat", "“the same”", "“the same”"]
    assert texts.matches.tolist() == [[0, 0], [1, 0], [2, 1]]
    assert len(pairs.images) == 2
    assert pairs.duplicates == "by id"


def test_equal_captions_may_be_right_by_their_string_and_captions_lowered(tmp_path):
    pairs = benchmark(tmp_path, duplicates="by string", lower_case=True)
    assert list(pairs.texts["en"].texts) == ["a cat", '"the same"', '"the same"']
    assert pairs.texts["en"].matches.tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert "lower case" in pairs.cleaning


def test_a_language_that_a_benchmark_has_not_is_refused(tmp_path):
    with pytest.raises(DataError, match="captions in en; expected zh as well"):
        benchmark(tmp_path, languages=["zh"])


def naive_translations(first, second):
    """Pair the texts of each image that have one turn, one by one."""
    return sorted(
        {
            (text, other)
            for text, image_number, turn in first
            for other, *of_other in second
            if of_other == [image_number, turn]
        }
    )


def test_main_captions_of_one_concept_are_translations_each_once(data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    ((languages, translations),) = pairs.translations.items()
    assert languages == ("en", "zh")
    said = [(pairs.texts["en"].texts[a], pairs.texts["zh"].texts[b]) for a, b in translations]
    assert sorted(said) == sorted(THINGS)


def test_concepts_that_share_captions_and_those_without_a_language_are_paired_rightly(tmp_path):
    samples = [
        make_sample(0, captions={"zh": ["甲"]}, concept="only zh"),
        make_sample(1, captions={"zh": ["乙"], "en": ["b"]}, concept="b"),
        make_sample(2, captions={"zh": ["甲"], "en": ["a"]}, concept="a"),
        make_sample(3, captions={"zh": ["甲"], "en": ["a"]}, concept="a again"),
        make_sample(4, captions={"en": ["a", "c"]}, concept="only en"),
    ]
    pairs = pairs_of(tmp_path, samples)
    assert list(pairs.texts["zh"].texts) == ["甲", "乙"]
    assert list(pairs.texts["en"].texts) == ["b", "a"]
    assert pairs.translations["en", "zh"].tolist() == [[0, 1], [1, 0]]


def test_languages_are_paired_with_english_or_else_with_the_first(tmp_path):
    captions = {"de": ["a"], "zh": ["甲"], "en": ["b"]}
    write_split(tmp_path, [make_sample(0, captions=captions)], split="test")
    for languages, expected in (
        (["de", "zh", "en"], [("en", "de"), ("en", "zh")]),
        (["zh", "de"], [("zh", "de")]),
        (["zh"], []),
    ):
        pairs = pairs_of_split(of_split(tmp_path, "test"), languages=languages)
        assert list(pairs.translations) == expected
        assert all(each.tolist() == [[0, 0]] for each in pairs.translations.values())


def test_texts_without_a_common_concept_are_no_translations(tmp_path):
    samples = [
        make_sample(0, captions={"zh": ["甲"]}, concept="a"),
        make_sample(1, captions={"en": ["b"]}, concept="b"),
    ]
    assert pairs_of(tmp_path, samples).translations == {}


def test_the_nth_captions_of_an_image_are_translations():
    rng = np.random.default_rng(0)
    sides = {"zh": [], "en": []}
    for side in sides.values():
        seen = [0] * 15
        for text in range(40):  # a text may have several images, an image any number of texts
            for of in np.unique(rng.integers(0, 15, 2)).tolist():
                seen[of] += int(rng.integers(1, 3))  # one before it may have been left out
                side.append((text, of, seen[of]))
    columns = {language: np.array(side, np.int64) for language, side in sides.items()}
    found = translations_of(columns)["en", "zh"]
    assert found.dtype == np.int64
    assert found.tolist() == [list(p) for p in naive_translations(sides["en"], sides["zh"])]
    assert translations_of({"zh": columns["zh"]}) == {}


@pytest.mark.parametrize("duplicates", ["by id", "by string"])
def test_a_caption_that_was_left_out_moves_no_other_to_its_place(tmp_path, duplicates):
    (tmp_path / "0.png").write_bytes(encoded(make_image(0)))
    (tmp_path / "1.png").write_bytes(encoded(make_image(1)))
    rows = ["image,caption_en,caption_zh", "0.png,a red apple,", "0.png,a green tree,绿树"]
    rows += ["1.png,a white house,白房子", "1.png,,黑猫", "1.png,a blue car,蓝色汽车"]
    (tmp_path / "mine.csv").write_text("\n".join(rows), encoding="utf-8")
    pairs = opened(tmp_path / "mine.csv", allowed_share=0.5, duplicates=duplicates)
    said = [
        (pairs.texts["en"].texts[a], pairs.texts["zh"].texts[b])
        for a, b in pairs.translations["en", "zh"].tolist()
    ]
    assert said == [
        ("a green tree", "绿树"),
        ("a white house", "白房子"),
        ("a blue car", "蓝色汽车"),
    ]


CATS = ["a cat", "a dog", "a cat", "a cat"]
PAIRS = np.array([[0, 0], [1, 0], [1, 2], [2, 1], [3, 0]])


def test_by_id_a_text_has_the_images_that_the_file_gives_it():
    assert correct_pairs(CATS, PAIRS, "by id").tolist() == PAIRS.tolist()


def test_by_string_a_text_has_every_image_with_an_equal_text():
    expected = {
        (text, image)
        for text, string in enumerate(CATS)
        for other, image in PAIRS.tolist()
        if CATS[other] == string
    }
    pairs = correct_pairs(CATS, PAIRS, "by string")
    assert set(map(tuple, pairs.tolist())) == expected
    assert len(pairs) == len(expected)
    assert pairs.dtype == np.int64


def test_no_captions_have_no_pairs():
    none = np.zeros((0, 2), np.int64)
    assert correct_pairs([], none, "by id").shape == (0, 2)
    assert correct_pairs([], none, "by string").shape == (0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_texts_and_images_are_grouped_as_by_walking_from_each_to_its_neighbours(seed):
    rng = np.random.default_rng(seed)
    texts, images = 30, 25
    matches = rng.integers(0, [texts, images], (int(rng.integers(0, 45)), 2))
    if seed % 2:  # a chain, the farthest that a number has to travel
        matches = np.array([(n, n + shift) for n in range(20) for shift in (0, 1)])
        matches = rng.permutation(matches)
    of_text, of_image = linked_groups(matches, texts=texts, images=images)
    neighbours = {node: set() for node in range(texts + images)}
    for text, image in matches.tolist():
        neighbours[text].add(texts + image)
        neighbours[texts + image].add(text)
    sets, left = [], set(neighbours)
    while left:
        reached = [left.pop()]
        for node in reached:
            reached += list(neighbours[node] & left)
            left -= neighbours[node]
        sets.append(frozenset(reached))
    found = {}
    for node, group in enumerate([*of_text.tolist(), *of_image.tolist()]):
        found.setdefault(group, set()).add(node)
    assert set(map(frozenset, found.values())) == set(sets)
