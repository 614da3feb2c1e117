"""The report of a run of `vlm eval classification`: scores, confusions, classes, examples."""

from collections.abc import Iterator

import numpy as np

from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.classification.metrics import Classification
from vlm.evaluation.classification.run import ClassificationRun
from vlm.markdown import markdown_table
from vlm.reports.document import (
    Block,
    Bullets,
    CodeBlock,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    Table,
    score_cell,
    without_code,
)
from vlm.reports.examples import Answer, Example, Found
from vlm.reports.plots import MOST_CLASSES, confusion_png

_CONFUSIONS, _CLASSES, _EXAMPLES = 10, 10, 3  # that are shown of each kind
_SEED = 0


def classification_document(run: ClassificationRun) -> Document:
    """Return the whole report of a run."""
    images, classes = len(run.images.images), len(run.classes.ids)
    summary = (
        f"`{without_code(run.bundle)}` assigns each of {images:,} images to one of {classes:,} "
        "classes."
    )
    return Document(
        title="Zero-shot classification",
        summary=[Paragraph(summary)],
        sections=[
            _scores(run),
            Section(title="Confusions", blocks=list(_confusions(run))),
            Section(title="Classes", blocks=list(_classes(run))),
            Section(title="Examples", blocks=list(_examples(run))),
            Section(title="Protocol", blocks=list(_protocol(run))),
        ],
    )


def format_classification(run: ClassificationRun) -> str:
    """Return how many images and classes there are, and a Markdown table of scores."""
    table = markdown_table(*_score_rows(run, with_intervals=False))
    shown, classes = len(np.unique(run.images.labels)), len(run.classes.ids)
    return (
        f"{len(run.images.images)} images of {shown} of {classes} classes; "
        f"{run.images.left_out} left out\n\n{table}"
    )


def _score_rows(
    run: ClassificationRun, *, with_intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each language and each baseline; text in the first column."""
    intervals = run.intervals if with_intervals else {}
    rows = [
        [name, *(
            "-" if value is None else score_cell(value, intervals.get(f"{name}/{key}"))
            for key, value in found.means().items()
        )]
        for name, found in {**run.scores, **run.baselines}.items()
    ]  # fmt: skip
    return ["names", "top-1", "top-5", "mean per class"], rows


def _scores(run: ClassificationRun) -> Section:
    header, rows = _score_rows(run)
    return Section(
        title="Scores",
        blocks=[
            Table(header=header, rows=rows),
            Bullets([
                "top-k is the fraction of images whose correct class is among the first k. The "
                "mean per class averages the top-1 of each class that has images.",
                f"± is half the width of the {LEVEL:.0%} bootstrap interval over images; a class "
                "that a resample lacks is left out of its mean per class.",
                "`random` orders the classes at random, `majority` by their number of images.",
            ]),
        ],
    )  # fmt: skip


def _confusions(run: ClassificationRun) -> Iterator[Block]:
    english = run.classes.names.get("en")  # the letters of plots are English
    drawn = len(run.classes.ids) <= MOST_CLASSES
    if not drawn:
        yield Paragraph(
            f"No plot: found {len(run.classes.ids):,} classes, and a plot can show up to "
            f"{MOST_CLASSES:,}. `classification.json` has all confusions."
        )
    for language, found in run.scores.items():
        if drawn:
            yield Figure(
                name=f"confusion_{language}.png",
                content=confusion_png(
                    found.confusion,
                    [names[0] for names in english] if english else run.classes.ids,
                    title=f"class names in {language!r}: top-1 {found.top1:.3f}",
                ),
                alt=f"Confusion matrix with class names in {language}",
            )
        rows = _confusion_rows(run, found)
        if rows:
            yield Table(
                header=["true class", "predicted class", "images", "% of the class"],
                rows=rows,
                text_columns=2,
                caption=f"Most frequent confusions with class names in {language}",
            )
        else:
            yield Paragraph(f"With class names in {language}, every prediction is correct.")


def _confusion_rows(run: ClassificationRun, found: Classification) -> list[list[str]]:
    wrong = found.confusion[found.confusion[:, 0] != found.confusion[:, 1]]
    order = np.argsort(-wrong[:, 2], kind="stable")[:_CONFUSIONS]
    of_class = np.bincount(run.images.labels)
    return [
        [
            _name(run, true), _name(run, predicted), f"{images:,}",
            f"{images / of_class[true]:.1%}",
        ]
        for true, predicted, images in wrong[order].tolist()
    ]  # fmt: skip


def _classes(run: ClassificationRun) -> Iterator[Block]:
    recalls = np.stack([found.class_recall for found in run.scores.values()], axis=1)
    images = np.bincount(run.images.labels, minlength=len(recalls))
    shown = np.flatnonzero(images)
    means = recalls[shown].mean(axis=1)
    best, worst = (shown[np.lexsort((-images[shown], order))] for order in (-means, means))
    yield Paragraph(
        "Top-1 of each class by language, ordered by the mean over languages, which is 0 for "
        f"{int((means == 0).sum()):,} of the {len(shown):,} classes."
    )
    parts = {"": best}
    if len(shown) > 2 * _CLASSES:
        parts = {
            f"{_CLASSES} best classes": best[:_CLASSES],
            f"{_CLASSES} worst classes": worst[:_CLASSES],
        }
    for caption, part in parts.items():
        yield Table(
            header=["class", "images", *run.scores],
            rows=[
                [_name(run, number), f"{images[number]:,}", *map(score_cell, recalls[number])]
                for number in part.tolist()
            ],
            caption=caption,
        )  # fmt: skip
    if len(shown) < len(recalls):
        yield Paragraph(f"{len(recalls) - len(shown):,} more classes have no images.")


def _examples(run: ClassificationRun) -> Iterator[Block]:
    yield Paragraph(
        "Images drawn at random from each kind, with the highest-scoring classes in each language. "
        "A prediction is correct if the true class comes first; a true class that is not among "
        "those shown is added below them, without its cosine."
    )
    correct = np.stack([found.ranks == 1 for found in run.scores.values()])
    kinds = {
        "Correct in every language": correct.all(axis=0),
        "Correct in only one language": correct.sum(axis=0) == 1,
        "Wrong in every language": ~correct.any(axis=0),
    }
    if len(correct) == 1:
        kinds = {"Correct": correct[0], "Wrong": ~correct[0]}
    for title, holds in kinds.items():
        images = np.flatnonzero(holds)
        if len(images):
            drawn = np.random.default_rng(_SEED).permutation(images)[:_EXAMPLES]
            yield Examples(
                title=f"{title}: {len(images):,} of {len(holds):,} images",
                examples=[_example(run, image) for image in drawn.tolist()],
            )


def _example(run: ClassificationRun, image: int) -> Example:
    """Return which classes score highest for an image in each language, and its own."""
    answers = []
    for language, found in run.scores.items():
        names, own = run.classes.names[language], int(run.images.labels[image])
        best, cosines = found.best[image].tolist(), found.cosines[image].tolist()
        classes = [
            Found(text=names[number][0], correct=number == own, cosine=cosine)
            for number, cosine in zip(best, cosines, strict=True)
        ]
        if own not in best:
            classes.append(Found(text=names[own][0], correct=True))
        rank = int(found.ranks[image])
        answers.append(Answer(language=language, found=classes, rank=rank, what="class"))
    shown = Found(image=run.images.images[image], text=run.images.addresses[image])
    return Example(image=shown, answers=answers)


def _protocol(run: ClassificationRun) -> Iterator[Block]:
    reading, source = run.reading, run.source.as_record()
    where = without_code(" ".join(source.pop("where")))
    asked = ", ".join(f"{key} `{without_code(value)}`" for key, value in source.items())
    transform = ", ".join(f"{key} {value}" for key, value in reading.transform.items())
    yield Bullets([
        f"Images: {asked}{f', where `{where}`' if where else ''}: {len(run.images.images):,} "
        f"scored, {run.images.left_out:,} left out. SHA-256 of the images and labels: "
        f"`{run.images_sha256}`.",
        f"{len(run.classes.ids):,} classes; a wrong class with the same cosine as the true one "
        "ranks before it.",
        f"Weights `{reading.model[:12]}`, tokenizer `{reading.tokenizer[:12]}`, "
        f"{reading.embed_dim} dimensions.",
        f"Max {reading.context_length} tokens; {reading.truncated_share:.2%} of the prompts "
        "truncated.",
        f"Image transform: {transform}.",
    ])  # fmt: skip
    for language, templates in run.templates.items():
        plural = "s" if len(templates) != 1 else ""
        yield Paragraph(f"{len(templates)} template{plural} in {language} for each class name:")
        yield CodeBlock("\n".join(templates))


def _name(run: ClassificationRun, number: int) -> str:
    """Return the first name of a class in each language."""
    names = dict.fromkeys(names[number][0] for names in run.classes.names.values())
    return without_code(" · ".join(names))
