"""Teach an English model Chinese on data/emoji: which start of the new rows learns fastest?

A model is trained on the English captions with CLIP's vocabulary, grown to `tokenizers/clip-zh`
with each kind of start, and trained on the Chinese captions for a fixed short while. One JSON
object goes to stdout, a Markdown table to stderr; `benchmarks/README.md` says what is equal.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setting import ROOT, describe_setting, leave

CONFIG = "configs/train/emoji-en.yaml"
CONTINUED = "configs/train/emoji-zh.yaml"
TOKENIZER = ROOT / "tokenizers" / "clip-zh"
CONTEXT_LENGTH = 32
SPLITS = ("test_style", "test_novel_style")
RECALLS = [
    f"{direction}/recall@{k}"
    for direction in ("text_to_image", "image_to_text")
    for k in (1, 5, 10)
]


@dataclass(frozen=True)
class Course:
    """What happens after the English model is trained."""

    grow: tuple[str, ...] | None
    """Flags of `vlm grow`; None for a new model of random weights."""
    train: tuple[str, ...] = ()
    """Flags of `vlm train`."""


def courses(vectors: Path, new_rows_steps: int) -> dict[str, Course]:
    """Return what is compared, by name."""
    similarity = ("--init", "similarity", "--vectors", str(vectors))
    new_rows = (
        f'--stages=[{{"steps":{new_rows_steps},"trained":"new_rows"}},{{"trained":"all"}}]',
    )
    both = ('--captions.languages=["zh","en"]',)
    return {
        "from scratch": Course(None),
        "random": Course(("--init", "random")),
        "mean of sub-pieces": Course(("--init", "mean")),
        "similarity (OFA)": Course(similarity),
        "lexicon": Course(("--init", "lexicon")),
        "lexicon, new rows first": Course(("--init", "lexicon"), new_rows),
        "lexicon, both languages": Course(("--init", "lexicon"), both),
    }


def vlm(*words: str) -> None:
    """Run a command of this package on one thread and no GPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "vlm", *words], cwd=ROOT, env=environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"vlm {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}"
        )


def dictionary_vectors(path: Path, *, width: int = 128) -> None:
    """Write vectors of Chinese and English words in one space, from CC-CEDICT alone.

    The matrix of Chinese words by the English words of their definitions, weighted by tf-idf, is
    decomposed; both sides are scaled by the roots of its singular values.
    """
    import torch

    from vlm.text.lexicon import read_lexicon

    lexicon = read_lexicon()
    words_of = {
        word: Counter(re.findall("[a-z]+", " ".join(translations).lower()))
        for word, translations in lexicon.items()
    }
    documents = Counter(english for counts in words_of.values() for english in counts)
    english_words = [word for word, count in documents.items() if count >= 2]
    column = {word: index for index, word in enumerate(english_words)}
    rows, columns, values = [], [], []
    chinese_words = list(words_of)
    for row, word in enumerate(chinese_words):
        known = {english: n for english, n in words_of[word].items() if english in column}
        weights = torch.tensor([n / documents[english] ** 0.5 for english, n in known.items()])
        rows += [row] * len(known)
        columns += [column[english] for english in known]
        values.append(weights / weights.norm().clamp(min=1e-9))
    torch.manual_seed(0)
    matrix = torch.sparse_coo_tensor(
        torch.tensor([rows, columns]),
        torch.cat(values),
        (len(chinese_words), len(english_words)),
        check_invariants=True,
    ).coalesce()
    u, s, v = torch.svd_lowrank(matrix, q=width, niter=4)
    with path.open("w", encoding="utf-8") as file:
        for words, side in ((chinese_words, u), (english_words, v)):
            for word, vector in zip(words, (side * s.sqrt()).tolist(), strict=True):
                if " " not in word:
                    file.write(f"{word} {' '.join(f'{x:.5f}' for x in vector)}\n")


def score(bundle: Path) -> dict[str, float]:
    """Return the mean recall of a bundle by split and language."""
    from vlm.data.config import SourceConfig
    from vlm.embedding.embedder import Embedder
    from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
    from vlm.evaluation.retrieval.pairs import pairs_of_split

    embedder = Embedder.load(bundle, device="cpu")
    result = {}
    for split in SPLITS:
        emoji = SourceConfig(path=str(ROOT / "data" / "emoji"), split=split)
        pairs = pairs_of_split(emoji, languages=("zh", "en"))
        scores = evaluate_retrieval(embedder, pairs)
        for language in ("zh", "en"):
            recalls = [scores[f"{language}/{recall}"] for recall in RECALLS]
            result[f"{split}/{language}"] = statistics.mean(recalls)
    return result


def run_seed(
    folder: Path, compared: Mapping[str, Course], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Train the English model of a seed and everything that follows; return all scores."""
    quiet = ("--evaluation.every_steps=0", "--checkpoint.every_steps=0", f"--seed={seed}")
    english = (
        "train", "--config", CONFIG, *quiet,
        f"--schedule.steps={options.steps}", f"--schedule.warmup_steps={options.steps // 10}",
    )  # fmt: skip
    vlm(*english, f"--tokenizer={folder.parent / 'clip'}", f"--run_folder={folder / 'english'}")
    before = {"after": score(folder / "english" / "bundle")}
    results: dict[str, dict[str, dict[str, float]]] = {"English model": before}
    for name, course in compared.items():
        place = folder / re.sub(r"\W+", "-", name)
        budget = (f"--schedule.steps={options.continued}",
                  f"--schedule.warmup_steps={options.continued // 10}")  # fmt: skip
        scores: dict[str, dict[str, float]] = {}
        if course.grow is None:
            vlm(*english, *budget, f"--tokenizer={folder.parent / 'clip-zh'}",
                '--captions.languages=["zh"]', f"--run_folder={place}")  # fmt: skip
        else:
            grown = place.with_name(f"{place.name}-grown")
            vlm("grow", str(folder / "english" / "bundle"),
                "--tokenizer", str(folder.parent / "clip-zh"), *course.grow,
                "--out", str(grown))  # fmt: skip
            scores["before"] = score(grown)
            vlm("train", "--config", CONTINUED, "--start_from", str(grown), *quiet, *budget,
                *course.train, f"--run_folder={place}")  # fmt: skip
        scores["after"] = score(place / "bundle")
        results[name] = scores
        print(f"seed {seed}: {name}: {scores}", file=sys.stderr)
    return results


def table(runs: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """Return a Markdown table of mean recalls, means over seeds."""
    from vlm.markdown import markdown_table

    def cell(name: str, when: str, key: str) -> str:
        values = [run[name][when][key] for run in runs if when in run[name]]
        if not values:
            return ""
        ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{ends}"

    keys = [(split, language) for language in ("zh", "en") for split in SPLITS]
    header = ["start", "zh test_style before"]
    header += [f"{language} {split}" for split, language in keys]
    rows = [
        [name, cell(name, "before", "test_style/zh")]
        + [cell(name, "after", f"{split}/{language}") for split, language in keys]
        for name in runs[0]
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the English model")
    parser.add_argument("--continued", type=int, default=150, help="steps on Chinese captions")
    parser.add_argument("--new-rows-steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, one a seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="of the compared, these alone")
    parser.add_argument("--folder", type=Path, help="keep the runs here instead of nowhere")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    setting = describe_setting("benchmarks/vocabulary_growth.py", threads=1)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        context = ("--context_length", str(CONTEXT_LENGTH))
        vlm("tokenizer", "import", "clip", *context, "--out", str(folder / "clip"))
        vlm("tokenizer", "import", str(TOKENIZER), *context, "--out", str(folder / "clip-zh"))
        dictionary_vectors(folder / "cedict.vec")
        compared = courses(folder / "cedict.vec", options.new_rows_steps)
        compared = {n: c for n, c in compared.items() if not options.only or n in options.only}
        runs = [
            run_seed(folder / f"seed-{seed}", compared, seed, options)
            for seed in range(options.first_seed, options.first_seed + options.seeds)
        ]
    leave(setting | {"runs": runs}, table(runs), options.out)


if __name__ == "__main__":
    main()
