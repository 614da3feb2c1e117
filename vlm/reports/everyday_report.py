"""What everyday questions found: scores, and questions that were answered and missed."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.retrieval.everyday import SHOWN, EverydayAnswers
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.reports.document import Bullets, Section, Table, score_cell
from vlm.reports.examples import Answer, Example, image_of

_KINDS = ("hit@1", f"hit@{SHOWN}", f"precision@{SHOWN}")


def everyday_section(asked: Mapping[str, EverydayAnswers]) -> Section:
    """Return the scores of everyday questions; without blocks if none were asked."""
    if not asked:
        return Section(title="Everyday questions", blocks=[])
    header, rows = everyday_rows(asked, with_intervals=True)
    return Section(
        title="Everyday questions",
        blocks=[
            Table(header=header, rows=rows, text_columns=2),
            Bullets([
                f"hit@k is the ratio of questions with a right image among the first k, precision"
                f"@{SHOWN} that of right images among the first {SHOWN}; chance is random order in "
                "the mean.",
                f"± is half the width of the {LEVEL:.0%} bootstrap interval over questions.",
            ]),
        ],
    )  # fmt: skip


def everyday_rows(
    asked: Mapping[str, EverydayAnswers], *, with_intervals: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each benchmark and language; text in 2 columns."""
    header = ["benchmark", "language", "questions", *_KINDS]
    header += [f"{kind} by chance" for kind in _KINDS[:2]]
    rows = [
        [
            benchmark, language, str(len(found.questions)),
            *(
                score_cell(
                    found.scores[f"{language}/{kind}"],
                    found.intervals.get(f"{language}/{kind}") if with_intervals else None,
                )
                for kind in _KINDS
            ),
            *(score_cell(found.chance[kind]) for kind in _KINDS[:2]),
        ]
        for benchmark, found in asked.items()
        for language in found.found
    ]  # fmt: skip
    return header, rows


def answered_questions(
    pairs: RetrievalPairs, asked: EverydayAnswers, *, most: int
) -> list[Example]:
    """Return the questions with the most right images in all languages, best first."""
    right = _right_images(asked)
    best = np.argsort(-right, kind="stable")[:most]
    return [_example(pairs, asked, number) for number in best.tolist() if right[number] > 0]


def missed_questions(pairs: RetrievalPairs, asked: EverydayAnswers, *, most: int) -> list[Example]:
    """Return questions without a right image in any language, drawn at random."""
    missed = np.random.default_rng(0).permutation(np.flatnonzero(_right_images(asked) == 0))
    return [_example(pairs, asked, number) for number in missed[:most].tolist()]


def _right_images(asked: EverydayAnswers) -> Float[np.ndarray, " questions"]:
    of_languages: Sequence[np.ndarray] = [each.sum(axis=1) for each in asked.correct.values()]
    right: Float[np.ndarray, " questions"] = np.mean(of_languages, axis=0)
    return right


def _example(pairs: RetrievalPairs, asked: EverydayAnswers, number: int) -> Example:
    question = asked.questions[number]
    answers = [
        Answer(
            language=language,
            query=question.texts[language],
            found=[
                image_of(pairs, image, correct=correct, cosine=cosine)
                for image, correct, cosine in zip(
                    found[number].tolist(),
                    asked.correct[language][number].tolist(),
                    asked.cosines[language][number].tolist(),
                    strict=True,
                )
            ],
        )
        for language, found in asked.found.items()
    ]
    shown = any(each.correct for answer in answers for each in answer.found)
    right = next(
        place for place, concept in enumerate(pairs.concepts) if concept in question.answers
    )
    missed = None if shown else image_of(pairs, right, correct=True)
    return Example(answers=answers, missed=missed)
