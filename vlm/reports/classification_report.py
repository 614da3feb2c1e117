"""The report of a run of `vlm eval classification`: scores, confusions, classes, examples."""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool

from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.classification.metrics import Classification
from vlm.reports.classification_run import ClassificationRun, classification_rows
from vlm.reports.confusion_plot import MOST_CLASSES, confusion_png
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
    without_code,
)
from vlm.reports.examples import CaptionAnswer, CaptionExample, FoundCaption

_CONFUSIONS, _CLASSES, _EXAMPLES = 10, 10, 3  # that are shown of each kind
_SEED = 0


def classification_document(run: ClassificationRun) -> Document:
    """Return the whole report of a run."""
    images, classes = len(run.images.images), len(run.classes.ids)
    summary = (
        f"`{without_code(run.bundle)}` says which of {classes:,} classes each of {images:,} "
        "images shows."
    )
    return Document(
        title="Zero-shot classification",
        summary=[Paragraph(summary)],
        sections=[
            _scores(run),
            Section(title="What is taken for what", blocks=list(_confusions(run))),
            Section(title="Classes", blocks=list(_classes(run))),
            Section(title="Right and wrong", blocks=list(_examples(run))),
            Section(title="What was asked, and how it was read", blocks=list(_questions(run))),
        ],
    )


def _scores(run: ClassificationRun) -> Section:
    header, rows = classification_rows(run, with_intervals=True)
    return Section(
        title="Scores",
        blocks=[
            Table(header=header, rows=rows),
            Bullets([
                "top-k is the share of images whose right class is among the first k; the mean "
                "per class is that of each class's own top-1, over classes with images.",
                f"± is half the width of the {LEVEL:.0%} bootstrap interval, for which images "
                "are drawn; those of a class that is not drawn count for nothing in the mean per "
                "class.",
                "`random` orders the classes by chance, `majority` by their number of images.",
            ]),
        ],
    )  # fmt: skip


def _confusions(run: ClassificationRun) -> Iterator[Block]:
    drawn = len(run.classes.ids) <= MOST_CLASSES
    if not drawn:
        yield Paragraph(
            f"There is no plot: {len(run.classes.ids):,} classes are more than the "
            f"{MOST_CLASSES:,} that can be told apart in one. `classification.json` has what every "
            "class was taken for."
        )
    for language, found in run.scores.items():
        if drawn:
            yield _confusion_plot(run, language)
        rows = _confusion_rows(run, found)
        if rows:
            yield Table(
                header=["right class", "given class", "images", "of the class"],
                rows=rows,
                text_columns=2,
                caption=f"The most frequent confusions, by names in {language}",
            )
        else:
            yield Paragraph(f"By names in {language}, every image was given its own class.")


def _confusion_plot(run: ClassificationRun, language: str) -> Figure:
    english = run.classes.names.get("en")  # the letters of plots are English
    found = run.scores[language]
    return Figure(
        name=f"confusion_{language}.png",
        content=confusion_png(
            found.confusion,
            [names[0] for names in english] if english else run.classes.ids,
            title=f"class names in {language!r}: top-1 {found.top1:.3f}",
        ),
        alt=f"What each class's images were given, by names in {language}",
    )


def _confusion_rows(run: ClassificationRun, found: Classification) -> list[list[str]]:
    wrong = found.confusion[found.confusion[:, 0] != found.confusion[:, 1]]
    order = np.argsort(-wrong[:, 2], kind="stable")[:_CONFUSIONS]
    of_class = np.bincount(run.images.labels)
    return [
        [
            _called(run, right), _called(run, given), f"{images:,}",
            f"{images / of_class[right]:.1%}",
        ]
        for right, given, images in wrong[order].tolist()
    ]  # fmt: skip


def _classes(run: ClassificationRun) -> Iterator[Block]:
    recalls = np.stack([found.class_recall for found in run.scores.values()], axis=1)
    images = np.bincount(run.images.labels, minlength=len(recalls))
    shown = np.flatnonzero(images)
    means = recalls[shown].mean(axis=1)
    best, worst = (shown[np.lexsort((-images[shown], order))] for order in (-means, means))
    yield Paragraph(
        "Share of each class's images that were given it, by the names of each language; in the "
        f"order of the mean, which is 0 for {int((means == 0).sum()):,} of the {len(shown):,} "
        "classes."
    )
    parts = {"": best}
    if len(shown) > 2 * _CLASSES:
        parts = {
            f"The {_CLASSES} best": best[:_CLASSES],
            f"The {_CLASSES} worst": worst[:_CLASSES],
        }
    for caption, part in parts.items():
        yield Table(
            header=["class", "images", *run.scores],
            rows=[
                [_called(run, number), f"{images[number]:,}",
                 *(f"{recall:.3f}" for recall in recalls[number])]
                for number in part.tolist()
            ],
            caption=caption,
        )  # fmt: skip
    if len(shown) < len(recalls):
        yield Paragraph(f"{len(recalls) - len(shown):,} further classes have no images here.")


def _examples(run: ClassificationRun) -> Iterator[Block]:
    yield Paragraph(
        "Images drawn by chance from each kind, and the classes that score highest in each "
        "language. An image is right where its own class comes first; a right class that is not "
        "among those shown stands below them, without its cosine."
    )
    right = np.stack([found.ranks == 1 for found in run.scores.values()])
    for number, (title, holds) in enumerate(_kinds(right).items(), start=1):
        images = np.flatnonzero(holds)
        if len(images):
            drawn = np.random.default_rng(_SEED).permutation(images)[:_EXAMPLES]
            yield Examples(
                name=f"examples_{number}.svg",
                items=[_example(run, image) for image in drawn.tolist()],
                title=f"{title}: {len(images):,} of {len(holds):,} images",
            )


def _kinds(
    right: Bool[np.ndarray, "languages images"],
) -> Mapping[str, Bool[np.ndarray, " images"]]:
    if len(right) == 1:
        return {"Right": right[0], "Wrong": ~right[0]}
    return {
        "Right in every language": right.all(axis=0),
        "Right in one language alone": right.sum(axis=0) == 1,
        "Wrong in every language": ~right.any(axis=0),
    }


def _example(run: ClassificationRun, image: int) -> CaptionExample:
    """Return which classes score highest for an image in each language, and its own."""
    answers = []
    for language, found in run.scores.items():
        names, own = run.classes.names[language], int(run.images.labels[image])
        best, cosines = found.best[image].tolist(), found.cosines[image].tolist()
        shown = [
            FoundCaption(text=names[number][0], correct=number == own, cosine=cosine)
            for number, cosine in zip(best, cosines, strict=True)
        ]
        if own not in best:
            shown.append(FoundCaption(text=names[own][0], correct=True))
        rank = int(found.ranks[image])
        answers.append(CaptionAnswer(language=language, found=shown, rank=rank, what="class"))
    return CaptionExample(image=run.images.images[image], answers=answers)


def _questions(run: ClassificationRun) -> Iterator[Block]:
    reading, source = run.reading, dict(run.source)
    where = without_code(" ".join(source.pop("where", ())))
    asked = ", ".join(f"{key} `{without_code(value)}`" for key, value in source.items())
    transform = ", ".join(f"{key} {value}" for key, value in reading.transform.items())
    yield Bullets([
        f"Images of {asked}{f', where `{where}`' if where else ''}: "
        f"{len(run.images.images):,}, and {run.images.left_out:,} left out. Their SHA-256, "
        f"with their labels, is `{run.images_sha256}`.",
        f"{len(run.classes.ids):,} classes; a wrong class with the same cosine as the right one "
        "comes before it.",
        f"Weights `{reading.model[:12]}`, tokenizer `{reading.tokenizer[:12]}`, vectors of "
        f"{reading.embed_dim} numbers.",
        f"Prompts of at most {reading.context_length} tokens; cut were "
        f"{reading.truncated_share:.2%}.",
        f"How images are read: {transform}.",
    ])  # fmt: skip
    for language, templates in run.templates.items():
        plural = "s" if len(templates) != 1 else ""
        yield Paragraph(
            f"{len(templates)} template{plural} in {language}, into which each name of a class is "
            "put:"
        )
        yield CodeBlock("\n".join(templates))


def _called(run: ClassificationRun, number: int) -> str:
    """Return what a class is called, in all languages."""
    names = dict.fromkeys(names[number][0] for names in run.classes.names.values())
    return without_code(" · ".join(names))
