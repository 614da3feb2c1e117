"""The report of a classification holds what was counted, and examples that are as they say."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.builders import THINGS, encoded, make_image
from vlm.evaluation.classification.dataset import LabelledImages
from vlm.evaluation.classification.metrics import classification_intervals, score_classification
from vlm.evaluation.classification.prompts import ClassNames
from vlm.evaluation.classification.run import ClassificationRun
from vlm.evaluation.config import ClassificationSource
from vlm.evaluation.reading import Reading
from vlm.reports import classification_report
from vlm.reports.classification_report import classification_document, format_classification
from vlm.reports.document import Bullets, Examples, Figure, Paragraph, Table, write_report

CLASSES = 24
"""More than twice the ten that are shown; the last has no images."""


def made_run(languages=("zh", "en"), *, noise=1.5, classes=CLASSES):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes - 1, 200)
    weights = rng.normal(size=(classes, 16)).astype(np.float32)
    images = {
        language: (weights[labels] + noise * rng.normal(size=(200, 16))).astype(np.float32)
        for language in languages
    }
    scores = {
        language: score_classification(of_language, weights, labels)
        for language, of_language in images.items()
    }
    names = {
        language: [(f"{language} class {number}", "synonym") for number in range(classes)]
        for language in languages
    }
    return ClassificationRun(
        bundle="runs/a/bundle",
        source=ClassificationSource(split="val", where=["source=noto"]),
        images=LabelledImages(
            images=[encoded(make_image(number)) for number in range(200)],
            addresses=[f"a.tar#{number}" for number in range(200)], labels=labels, left_out=7,
        ),
        images_sha256="5" * 64,
        classes=ClassNames(ids=tuple(f"c{number}" for number in range(classes)), names=names),
        templates={language: (f"{{}} {language}", "{}") for language in languages},
        reading=Reading(
            model="a" * 64, embed_dim=16, tokenizer="b" * 64, context_length=32,
            truncated_share=0.25, transform={"size": 48}, logit_scale=20.0, logit_bias=0.0,
        ),
        scores=scores,
        intervals=classification_intervals(scores, labels),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return made_run()


@pytest.fixture(scope="module")
def document(run):
    return classification_document(run)


def blocks_of(document, title, kind):
    (section,) = [section for section in document.sections if section.title == title]
    return [block for block in section.blocks if isinstance(block, kind)]


def test_a_report_has_scores_confusions_classes_examples_and_questions(document):
    assert [section.title for section in document.sections] == [
        "Scores", "Confusions", "Classes", "Examples", "Protocol",
    ]  # fmt: skip


def test_intervals_are_quantiles_of_means_over_drawn_images(run):
    for language, found in run.scores.items():
        for key, k in (("top1", 1), ("top5", 5)):
            right = (found.ranks <= k).astype(float)
            rng = np.random.default_rng(5)
            means = [rng.choice(right, len(right)).mean() for _ in range(4000)]
            low, high = run.intervals[f"{language}/{key}"]
            assert low < right.mean() < high
            assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)


def naive_mean_of_classes(right, labels):
    """Average the shares of the classes that are there, one by one."""
    return np.mean([right[labels == number].mean() for number in set(labels.tolist())])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [6, 100], ids=["many a class", "two a class"])
def test_the_interval_of_the_mean_per_class_is_of_the_classes_drawn(classes):
    run = made_run(classes=classes)
    labels = run.images.labels
    for language, found in run.scores.items():
        right = found.ranks == 1
        assert found.mean_class_recall == pytest.approx(naive_mean_of_classes(right, labels))
        rng = np.random.default_rng(5)
        drawn = [rng.integers(len(labels), size=len(labels)) for _ in range(1500)]
        means = [naive_mean_of_classes(right[places], labels[places]) for places in drawn]
        expected = np.quantile(means, [0.025, 0.975])
        interval = run.intervals[f"{language}/mean_class_recall"]
        assert interval == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_fewer_than_ten_images_have_no_intervals():
    rng = np.random.default_rng(0)
    images, weights = (rng.normal(size=(n, 8)).astype(np.float32) for n in (10, 6))
    labels = np.arange(10) % 6
    for count, intervals in ((9, 0), (10, 3)):
        found = score_classification(images[:count], weights, labels[:count])
        assert len(classification_intervals({"en": found}, labels[:count])) == intervals


def test_scores_have_their_intervals_and_baselines_none(run, document):
    (scores,) = blocks_of(document, "Scores", Table)
    assert [row[0] for row in scores.rows] == ["zh", "en", "random", "majority"]
    zh = run.scores["zh"]
    for cell, key in zip(scores.rows[0][1:], ("top1", "top5", "mean_class_recall"), strict=True):
        low, high = run.intervals[f"zh/{key}"]
        assert cell == f"{getattr(zh, key):.3f} ±{(high - low) / 2:.3f}"
    assert scores.rows[2][1:] == [f"{1 / CLASSES:.3f}", f"{5 / CLASSES:.3f}", f"{1 / CLASSES:.3f}"]
    largest = max(Counter(run.images.labels.tolist()).values())
    assert scores.rows[3][1] == f"{largest / 200:.3f}"


def test_the_most_frequent_confusions_are_counted(run, document):
    tables = blocks_of(document, "Confusions", Table)
    plots = blocks_of(document, "Confusions", Figure)
    assert [plot.name for plot in plots] == ["confusion_zh.png", "confusion_en.png"]
    of_class = Counter(run.images.labels.tolist())
    for language, table in zip(("zh", "en"), tables, strict=True):
        given = run.scores[language].best[:, 0].tolist()
        pairs = zip(run.images.labels.tolist(), given, strict=True)
        counted = Counter(pair for pair in pairs if pair[0] != pair[1])
        assert [int(row[2]) for row in table.rows] == [n for _, n in counted.most_common(10)]
        for row in table.rows:
            right, wrong = (int(cell.rsplit(" ", 1)[1]) for cell in row[:2])
            assert row[0] == f"zh class {right} · en class {right}"
            assert counted[right, wrong] == int(row[2])
            assert row[3] == f"{counted[right, wrong] / of_class[right]:.1%}"


@pytest.mark.usefixtures("undrawn")
def test_more_classes_than_a_plot_can_show_have_none(monkeypatch):
    many = made_run(classes=12)
    for most, plots in ((12, 2), (11, 0)):
        monkeypatch.setattr(classification_report, "MOST_CLASSES", most)
        document = classification_document(many)
        assert len(blocks_of(document, "Confusions", Figure)) == plots
        assert len(blocks_of(document, "Confusions", Table)) == 2
    (said,) = blocks_of(document, "Confusions", Paragraph)
    assert said.text.startswith("No plot: found 12 classes, and a plot can show up to 11.")


def test_the_best_and_the_worst_classes_are_shown(run, document):
    best, worst = blocks_of(document, "Classes", Table)
    labels = run.images.labels
    expected = {}
    for number in sorted(set(labels.tolist())):
        of_class = labels == number
        recalls = [(found.ranks[of_class] == 1).mean() for found in run.scores.values()]
        expected[f"zh class {number} · en class {number}"] = (recalls, of_class.sum())
    means = sorted(np.mean(recalls) for recalls, _ in expected.values())
    for table, ends in ((best, means[::-1]), (worst, means)):
        for row, mean in zip(table.rows, ends[:10], strict=True):
            recalls, images = expected[row[0]]
            assert row[1:] == [str(images), *(f"{recall:.3f}" for recall in recalls)]
            assert np.mean(recalls) == pytest.approx(mean)
    (last,) = blocks_of(document, "Classes", Paragraph)[1:]
    assert last.text == f"{CLASSES - len(expected)} more classes have no images."


@pytest.mark.usefixtures("undrawn")
def test_few_classes_are_shown_in_one_table():
    (table,) = blocks_of(classification_document(made_run(classes=12)), "Classes", Table)
    assert len(table.rows) == 11


def test_examples_are_correct_where_they_say_and_show_their_own_class(run, document):
    right = np.stack([found.ranks == 1 for found in run.scores.values()]).sum(axis=0)
    groups = blocks_of(document, "Examples", Examples)
    kinds = ("Correct in every language", "Correct in only one language", "Wrong in every language")
    for group, title, languages in zip(groups, kinds, (2, 1, 0), strict=True):
        assert group.title == f"{title}: {(right == languages).sum()} of 200 images"
        assert len(group.examples) == 3
        for example in group.examples:
            number = run.images.images.index(example.image.image)
            assert example.image.text == f"a.tar#{number}"
            own = run.images.labels[number]
            assert sum(answer.rank == 1 for answer in example.answers) == languages
            for answer in example.answers:
                found = [caption.text for caption in answer.found]
                assert len(found) == 3 + (answer.rank > 3)
                place = answer.rank - 1 if answer.rank <= 3 else 3
                assert [caption.correct for caption in answer.found].index(True) == place
                assert found[place] == f"{answer.language} class {own}"
                cosines = [caption.cosine for caption in answer.found[:3]]
                assert cosines == sorted(cosines, reverse=True)


@pytest.mark.usefixtures("undrawn")
def test_one_language_has_correct_and_wrong_images():
    groups = blocks_of(classification_document(made_run(["en"], classes=8)), "Examples", Examples)
    assert [group.title.split(":")[0] for group in groups] == ["Correct", "Wrong"]


@pytest.mark.usefixtures("undrawn")
def test_a_model_that_is_always_correct_has_no_confusions_and_no_wrong_examples():
    document = classification_document(made_run(noise=0, classes=8))
    assert blocks_of(document, "Confusions", Table) == []
    assert len(blocks_of(document, "Confusions", Paragraph)) == 2
    (group,) = blocks_of(document, "Examples", Examples)
    assert group.title == "Correct in every language: 200 of 200 images"


@pytest.mark.usefixtures("undrawn")
def test_fewer_than_five_classes_have_no_top_5():
    few = made_run(classes=4)
    assert few.intervals.keys() == {
        f"{language}/{key}" for language in ("zh", "en") for key in ("top1", "mean_class_recall")
    }
    (scores,) = blocks_of(classification_document(few), "Scores", Table)
    assert {row[2] for row in scores.rows} == {"-"}
    assert few.as_record()["scores"]["zh"]["top5"] is None


def test_the_protocol_is_shown(document):
    (bullets,) = blocks_of(document, "Protocol", Bullets)
    shown = "\n".join(bullets.items)
    for part in (
        "data `data/emoji`, split `val`, label `class`, where `source=noto`",
        "200 scored, 7 left out",
        "5" * 64, f"{CLASSES} classes", "`aaaaaaaaaaaa`", "`bbbbbbbbbbbb`", "16 dimensions",
        "Max 32 tokens; 25.00% of the prompts truncated", "size 48",
    ):  # fmt: skip
        assert part in shown
    zh, en = blocks_of(document, "Protocol", Paragraph)
    assert zh.text.startswith("2 templates in zh")
    assert en.text.startswith("2 templates in en")


def test_the_report_is_written_with_its_images(document, tmp_path):
    page = write_report(tmp_path, document)
    names = {"confusion_zh.png", "confusion_en.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"report.html", "report.md"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"({name})" in text for name in names)
    assert "{} zh" in text
    assert page == tmp_path / "report.html"


def test_the_record_is_json_with_intervals(run):
    record = json.loads(json.dumps(run.as_record(), allow_nan=False))
    assert record["intervals"]["level"] == 0.95
    assert record["intervals"]["of"]["en/top1"] == list(run.intervals["en/top1"])
    assert record["scores"]["zh"]["class_recall"][f"c{CLASSES - 1}"] is None
    given = run.scores["zh"].best[:, 0].tolist()
    counted = Counter(zip(run.images.labels.tolist(), given, strict=True))
    assert {
        (right, wrong): images
        for right, of_class in record["scores"]["zh"]["confusion"].items()
        for wrong, images in of_class.items()
    } == {(f"c{right}", f"c{wrong}"): images for (right, wrong), images in counted.items()}
    assert record["protocol"]["truncated_share"] == 0.25
    assert record["protocol"]["where"] == ["source=noto"]


def test_the_table_counts_images_and_their_classes(run):
    shown = len(set(run.images.labels.tolist()))
    lines = format_classification(run).splitlines()
    assert lines[0] == f"200 images of {shown} of {CLASSES} classes; 7 left out"
    assert lines[4].split()[1:4] == ["zh", "|", f"{run.scores['zh'].top1:.3f}"]
    assert "±" not in lines[4]


@pytest.mark.usefixtures("undrawn")
def test_a_name_that_is_the_same_in_both_languages_stands_once():
    run = made_run(classes=8)
    names = [(en,) for en, _ in THINGS[:8]]
    same = replace(run, classes=ClassNames(ids=run.classes.ids, names={"zh": names, "en": names}))
    (table,) = blocks_of(classification_document(same), "Classes", Table)
    assert {row[0] for row in table.rows} == {en for en, _ in THINGS[:7]}


@pytest.mark.usefixtures("undrawn")
def test_backticks_in_names_are_no_mark_up():
    run = made_run(["en"], classes=8)
    names = {"en": [(f"`{number}`",) for number in range(8)]}
    marked = replace(
        run, bundle="a`b", source=ClassificationSource(data="c`d", where=["concept=`e`"]),
        classes=ClassNames(ids=run.classes.ids, names=names),
    )  # fmt: skip
    document = classification_document(marked)
    assert document.summary[0].text.startswith("`a'b` assigns")
    (table,) = blocks_of(document, "Classes", Table)
    assert {row[0] for row in table.rows} == {f"'{number}'" for number in range(7)}
    (bullets,) = blocks_of(document, "Protocol", Bullets)
    assert "data `c'd`, split `test_style`, label `class`, where `concept='e'`:" in bullets.items[0]
