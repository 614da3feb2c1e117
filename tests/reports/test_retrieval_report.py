"""The report of a retrieval run holds what was measured, and examples that are as they say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.builders import open_split
from vlm.evaluation.config import IndexPlan, RetrievalSource
from vlm.evaluation.retrieval.comparison import compare
from vlm.evaluation.retrieval.run import RetrievalRun, evaluate
from vlm.reports.document import Bullets, Table, as_markdown, write_report
from vlm.reports.examples import MISSED_BEYOND, _text_example, drawn_examples
from vlm.reports.retrieval_report import format_run, retrieval_document, retrieval_sections


@pytest.fixture(scope="module")
def run(embedder, data_folder):
    sources = [
        RetrievalSource(path=str(data_folder), name=name, split="test", languages=languages)
        for name, languages in (("both", ["zh", "en"]), ("chinese alone", ["zh"]))
    ]
    scored = evaluate(embedder, sources, bundle="runs/a/bundle")
    return scored.with_indexes(IndexPlan(factories=["HNSW8"], sweep=True), names=["both"])


def blocks_of(sections, title, kind):
    section = next(section for section in sections if section.title == title)
    return [block for block in section.blocks if isinstance(block, kind)]


@pytest.mark.usefixtures("undrawn")
def test_a_report_has_scores_languages_indexes_examples_and_questions(run):
    titles = [section.title for section in retrieval_document(run).sections]
    assert titles == [
        "Scores", "Languages", "Exact and approximate search", "Examples: both",
        "Examples: chinese alone", "Protocol",
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_the_tables_hold_what_was_measured(run):
    sections = retrieval_sections(run)
    evaluation = run.benchmarks["both"].evaluation
    (scores,) = blocks_of(sections, "Scores", Table)
    row = scores.rows[0]
    assert row[:3] == ["both", "zh", "text to image"]
    low, high = evaluation.intervals["zh/text_to_image/recall@5"]
    expected = evaluation.scores["zh/text_to_image/recall@5"]
    assert row[4] == f"{expected:.3f} ±{(high - low) / 2:.3f}"
    agreement, cosines = blocks_of(sections, "Languages", Table)
    same = evaluation.agreement["en/zh"]["same_image"]
    assert agreement.rows == [
        ["both", "en and zh", "12", f"{same:.3f}", *(
            f"{evaluation.agreement['en/zh'][f'both@{k}']:.3f}" for k in (1, 5, 10)
        )]
    ]  # fmt: skip
    assert len(cosines.rows) == 2 * 3
    right = evaluation.cosines["zh"].correct
    assert cosines.rows[0][:5] == ["both", "zh", "correct", "24", f"{right.mean:.3f}"]
    (asked,) = blocks_of(sections, "Protocol", Table)
    assert asked.rows[0][2] == evaluation.questions["zh"].fingerprint
    (indexes,) = blocks_of(sections, "Exact and approximate search", Table)
    assert {row[0] for row in indexes.rows} == {"HNSW8"}
    assert len(indexes.rows) == 5  # both directions in two languages, and images alone


def test_the_printed_table_has_a_row_for_each_language_and_direction(run):
    lines = format_run(RetrievalRun(bundle="b", benchmarks={"x": run.benchmarks["both"]}))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[:6]]
    assert rows[0] == ["benchmark", "language", "direction", "R@1", "R@5", "R@10", "MR",
                       "median rank", "MRR", "R@1 by chance"]  # fmt: skip
    assert [row[:3] for row in rows[2:]] == [
        ["x", language, direction]
        for language in ("zh", "en") for direction in ("text to image", "image to text")
    ]  # fmt: skip
    scores = run.benchmarks["both"].evaluation.scores
    recalls = [scores[f"en/image_to_text/recall@{k}"] for k in (1, 5, 10)]
    assert rows[5][3:] == [
        *(f"{recall:.3f}" for recall in recalls), f"{np.mean(recalls):.3f}",
        f"{scores['en/image_to_text/median_rank']:g}", f"{scores['en/image_to_text/mrr']:.3f}",
        f"{run.benchmarks['both'].baselines['chance']['en/image_to_text/recall@1']:.3f}",
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_the_report_says_where_benchmarks_were_read_from(run, data_folder):
    (said,) = blocks_of(retrieval_sections(run), "Protocol", Bullets)
    assert f"both: data folder, {data_folder}; split test; languages zh, en." in said.items


@pytest.mark.usefixtures("undrawn")
def test_examples_can_be_shown_of_some_benchmarks(run):
    sections = retrieval_sections(run, examples_of=["chinese alone"])
    assert sum(section.title.startswith("Examples") for section in sections) == 1


@pytest.mark.slow
def test_a_report_is_written_as_markdown_page_and_images(run, tmp_path):
    document = retrieval_document(run)
    page = write_report(tmp_path, document)
    assert page.name == "report.html"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in ("recall_curves.png", "cosines.png", "index_1.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 500
    assert text == as_markdown(document)


def test_the_record_is_json_without_vectors(run):
    record = json.loads(json.dumps(run.as_record(), allow_nan=False))
    both = record["benchmarks"]["both"]
    assert both.keys() == {
        "scores", "intervals", "agreement", "cosines", "questions", "reading", "kind", "split",
        "source", "baselines", "indexes",
    }  # fmt: skip
    assert both["indexes"]["comparisons"][0]["factory"] == "HNSW8"
    assert "HNSW8" in format_run(run)
    assert record["benchmarks"]["chinese alone"]["agreement"] == {}


def test_found_questions_were_found_and_missed_ones_were_missed(run, data_folder):
    split = open_split(data_folder, "test")
    addresses = [sample.address for sample in split]
    scored = run.benchmarks["both"]
    groups = drawn_examples(scored.pairs, scored.evaluation, of_each=4)
    assert list(groups)[-1] == "Images and the captions they find"
    assert len(groups) > 1
    for title, examples in list(groups.items())[:-1]:
        for example in examples:
            assert [answer.language for answer in example.answers] == ["en", "zh"]
            ranks = [answer.rank for answer in example.answers]
            if title.startswith("Not in"):
                assert min(ranks) > MISSED_BEYOND
                assert example.missed is not None
            elif "in both" in title:
                assert max(ranks) == 1
                assert example.missed is None
            for answer in example.answers:
                for found in answer.found:
                    assert found.image == scored.pairs.images[addresses.index(found.text)]
                first_correct = [image.correct for image in answer.found].index(True) + 1 if any(
                    image.correct for image in answer.found
                ) else None  # fmt: skip
                assert (first_correct == answer.rank) == (answer.rank <= len(answer.found))
                cosines = [image.cosine for image in answer.found]
                assert cosines == sorted(cosines, reverse=True)


def test_examples_of_images_show_the_best_captions(run, embedder):
    scored = run.benchmarks["both"]
    groups = drawn_examples(scored.pairs, scored.evaluation, of_each=2)
    examples = groups["Images and the captions they find"]
    assert len(examples) == 2
    for example in examples:
        for answer in example.answers:
            texts = scored.pairs.texts[answer.language].texts
            cosines = (
                embedder.encode_text(texts) @ embedder.encode_image([example.image.image]).T
            )[:, 0]
            best = np.argsort(-cosines)[:3]
            assert [found.text for found in answer.found] == [texts[row] for row in best]


def test_nothing_is_drawn_of_a_kind_that_does_not_occur(run):
    scored = run.benchmarks["chinese alone"]
    perfect = {"zh": {name: np.ones_like(found) for name, found in
                      scored.evaluation.ranks["zh"].items()}}  # fmt: skip
    groups = drawn_examples(scored.pairs, replace(scored.evaluation, ranks=perfect))
    assert list(groups) == ["Found at rank 1", "Images and the captions they find"]


def test_examples_stand_in_the_order_of_their_ranks_where_cosines_tie(run):
    """Of two equal images the correct one comes first in the benchmark."""
    scored = run.benchmarks["chinese alone"]
    images = scored.evaluation.image_features.copy()
    own = scored.pairs.texts["zh"]
    texts = scored.evaluation.text_features["zh"].copy()
    for row, image in own.matches[:12].tolist():
        images[image + 12] = images[image] = texts[row] = np.eye(32, dtype=np.float32)[row]
    matches = own.matches[own.matches[:, 1] < 12]  # the second image of each is wrong
    pairs = replace(scored.pairs, texts={"zh": replace(own, matches=matches)})
    ranks = {"zh": compare(texts, images, matches).ranks}
    assert set(ranks["zh"]["text_to_image"].tolist()) == {2}
    evaluation = replace(
        scored.evaluation, image_features=images, text_features={"zh": texts}, ranks=ranks
    )
    example = _text_example(pairs, evaluation, {"zh": 3})
    assert [image.correct for image in example.answers[0].found[:2]] == [False, True]


@pytest.mark.usefixtures("undrawn")
def test_names_with_signs_of_mark_up_stay_names(run, tmp_path):
    names = {"a`b": run.benchmarks["both"], "c`d": run.benchmarks["chinese alone"]}
    text = as_markdown(retrieval_document(RetrievalRun(bundle="x`y", benchmarks=names)))
    assert "`x'y` scored on a'b, c'd." in text
