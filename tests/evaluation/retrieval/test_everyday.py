"""Everyday questions: read strictly, scored as a plain loop scores them, and told in the report."""

import json

import numpy as np
import pytest
import yaml

from tests.builders import make_sample, write_split
from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.everyday import read_questions
from vlm.evaluation.retrieval.run import evaluate
from vlm.reports.everyday_report import answered_questions, missed_questions
from vlm.reports.retrieval_report import format_run, retrieval_document

QUESTIONS = [
    {"zh": f"问题 {number}", "en": f"question {number}", "answers": answers}
    for number, answers in enumerate(
        [["0"], ["1", "2"], ["3"], ["0", "3", "5"], ["4"], ["5"], ["6", "7"], ["8"], ["9"],
         ["10", "11", "1"], ["no such concept"]]
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Images of 12 concepts, the first 5 twice, and questions about them."""
    samples = [make_sample(number, concept=str(number % 12)) for number in range(17)]
    folder = write_split(tmp_path / "data", samples, split="test_style")
    (folder / "questions.yaml").write_text(yaml.safe_dump({"report": QUESTIONS, "choose": []}))
    return folder


@pytest.fixture
def run(embedder, folder):
    return evaluate(
        embedder, [RetrievalSource(path=str(folder), questions=folder / "questions.yaml")]
    )


def plainly_scored(embedder, scored, language):
    """Score with loops over sorted lists."""
    images = embedder.encode_image(scored.pairs.images)
    hits, some, precision = [], [], []
    for question in QUESTIONS[:-1]:
        (text,) = embedder.encode_text([question[language]])
        cosines = {place: float(np.float32(image @ text)) for place, image in enumerate(images)}
        right = {p for p, c in enumerate(scored.pairs.concepts) if c in question["answers"]}
        order = sorted(cosines, key=lambda place: (-cosines[place], place in right))[:5]
        hits.append(order[0] in right)
        some.append(any(place in right for place in order))
        precision.append(sum(place in right for place in order) / 5)
    return [sum(each) / len(each) for each in (hits, some, precision)]


def test_scores_are_those_of_a_plain_loop(embedder, run):
    scored = run.benchmarks["test_style"]
    for language in ("zh", "en"):
        found = [
            scored.everyday.scores[f"{language}/{kind}"]
            for kind in ("hit@1", "hit@5", "precision@5")
        ]
        assert found == pytest.approx(plainly_scored(embedder, scored, language))
    assert (len(scored.everyday.questions), scored.everyday.left_out) == (10, 1)


def test_chance_is_what_random_orders_find(run):
    found, rng = run.benchmarks["test_style"], np.random.default_rng(0)
    concepts = np.array(found.pairs.concepts)
    right = np.stack([np.isin(concepts, list(q.answers)) for q in found.everyday.questions])
    draws = np.stack([right[:, rng.permutation(len(concepts))[:5]] for _ in range(4000)])
    expected = {
        "hit@1": draws[:, :, 0].mean(), "hit@5": draws.any(axis=2).mean(),
        "precision@5": draws.mean(),
    }  # fmt: skip
    assert found.everyday.chance == pytest.approx(expected, abs=0.01)


def test_every_score_lies_in_its_interval(run):
    everyday = run.benchmarks["test_style"].everyday
    assert everyday.intervals.keys() == everyday.scores.keys()
    for name, (low, high) in everyday.intervals.items():
        assert low <= everyday.scores[name] <= high


def test_the_record_the_table_and_the_report_have_the_scores(run):
    everyday = run.benchmarks["test_style"].everyday
    record = json.loads(json.dumps(run.as_record()))["benchmarks"]["test_style"]["everyday"]
    assert record["scores"] == everyday.scores
    assert (record["questions"], record["left_out"]) == (10, 1)
    cell = f"{everyday.scores['zh/hit@5']:.3f}"
    assert cell in format_run(run).split("precision@5")[1]
    titles = [section.title for section in retrieval_document(run).sections]
    assert "Everyday questions" in titles


def test_questions_shown_as_answered_have_right_images_and_missed_ones_none(run):
    scored = run.benchmarks["test_style"]
    answered = answered_questions(scored.pairs, scored.everyday, most=4)
    right = [sum(i.correct for a in each.answers for i in a.found) for each in answered]
    assert len(right) == 4
    assert right == sorted(right, reverse=True)
    assert min(right) > 0
    missed = missed_questions(scored.pairs, scored.everyday, most=99)
    assert all(not image.correct for each in missed for a in each.answers for image in a.found)
    assert all(each.missed.correct for each in missed)
    both = [np.any([c[n] for c in scored.everyday.correct.values()]) for n in range(10)]
    assert len(missed) == both.count(False)


def test_the_fingerprint_changes_with_an_answer(embedder, folder, run):
    changed = [QUESTIONS[0] | {"answers": ["1"]}, *QUESTIONS[1:]]
    (folder / "questions.yaml").write_text(yaml.safe_dump(changed))
    again = evaluate(
        embedder, [RetrievalSource(path=str(folder), questions=folder / "questions.yaml")]
    )
    first, second = (each.benchmarks["test_style"].everyday for each in (run, again))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("held", "part", "said"),
    [
        ({"choose": QUESTIONS}, None, "has no part 'report'; found choose"),
        (QUESTIONS, "report", "has no parts; found part 'report'"),
        ([], None, "holds no questions"),
        ("text", None, "holds no questions"),
        ([{"zh": "猫", "answers": []}], None, r"has the answers \[\]; expected a list of concepts"),
        ([{"zh": "", "answers": ["1"]}], None, "expected its text by language"),
        (["a cat"], None, "expected its text by language"),
        ([QUESTIONS[0], {"zh": "猫", "answers": ["1"]}], None, "expected the same languages"),
    ],
)
def test_a_file_that_asks_nothing_is_refused(tmp_path, held, part, said):
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(held))
    with pytest.raises(DataError, match=said):
        read_questions(tmp_path / "questions.yaml", part=part)


def test_a_missing_file_and_a_part_without_questions_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read questions"):
        read_questions(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="part 'choose' without questions"):
        RetrievalSource(path="data", part="choose")


def test_questions_without_an_answer_among_the_images_are_refused(embedder, folder):
    (folder / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS[-1:]))
    with pytest.raises(DataError, match="none of 1 questions is answered by one of 17 images"):
        evaluate(embedder, [RetrievalSource(path=str(folder), questions=folder / "questions.yaml")])


def test_a_source_without_concepts_cannot_be_asked(embedder, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("image,caption\na.png,a cat\n")
    with pytest.raises(ConfigError, match="questions"):
        evaluate(embedder, [RetrievalSource(path=str(table), questions=tmp_path / "q.yaml")])
