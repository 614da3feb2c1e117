"""Measure what a batch of one-language pairs costs without its absent captions, and with them.

Half of the images have a Chinese caption, half an English one. `present` is the batch as the loader
makes it; `padded` has an empty text in the place of every absent caption, which the text tower
encodes and the loss leaves out. Both take turns. One JSON object goes to stdout, a Markdown table
to stderr.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from setting import ROOT, describe_setting, leave

from vlm.batches.batch import Batch
from vlm.batches.collate import collate
from vlm.batches.examples import Example
from vlm.data.config import SourceConfig
from vlm.data.source import open_source
from vlm.losses.bilingual import BilingualLoss
from vlm.markdown import markdown_table
from vlm.models.build import build_from_config
from vlm.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from vlm.models.pretraining import PretrainingModel
from vlm.text.caption_ids import NO_CAPTION, text_id
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.training.step import ContrastiveStep

LANGUAGES = ("zh", "en")
IMAGE_SIZE = 48


def examples_of(count: int) -> list[Example]:
    """Return the first emoji with one caption each, in one language and the other in turn."""
    samples = open_source(SourceConfig(path=str(ROOT / "data/emoji")))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    examples = []
    for number, image in enumerate(images):
        sample, language = samples[number], LANGUAGES[number % 2]
        captions = dict.fromkeys(LANGUAGES, "") | {language: sample.captions[language][0]}
        examples.append(Example(sample.uid, image, text_id(sample.concept), captions, seed=number))
    return examples


def padded(batch: Batch, examples: list[Example], tokenizer: Tokenizer) -> Batch:
    """Return the batch with an empty text in the place of every absent caption."""
    texts = {name: [each.captions[name] for each in examples] for name in LANGUAGES}
    return replace(
        batch,
        texts={name: tokenizer.encode(each) for name, each in texts.items()},
        text_rows=dict.fromkeys(LANGUAGES, torch.arange(len(examples))),
        caption_ids={
            name: torch.tensor([text_id(text) if text else NO_CAPTION for text in each])
            for name, each in texts.items()
        },
    )


def measure(passes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Return each pass's median seconds, and the medians of the ratios to `padded`, by round."""
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, run in passes.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            rounds[-1][name] = time.process_time() - cpu, time.perf_counter() - wall
    del rounds[0]  # the first warms up
    found: dict[str, Any] = {}
    for place, clock in enumerate(("cpu", "wall")):
        ratios = sorted(each["present"][place] / each["padded"][place] for each in rounds)
        found[clock] = {
            "ratio": statistics.median(ratios),
            "ratios": [ratios[0], ratios[-1]],
            **{name: statistics.median(each[name][place] for each in rounds) for name in passes},
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--width", type=int, default=512, help="of the text tower")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = describe_setting("benchmarks/one_language.py", threads=1)
    tokenizer = load_tokenizer(ROOT / "tokenizers" / "emoji-zh-en")
    torch.manual_seed(0)
    config = ModelConfig(
        vision_cfg=ImageTowerConfig(timm_model_name="test_resnet", image_size=IMAGE_SIZE),
        text_cfg=TextTowerConfig(
            width=options.width, heads=options.width // 64, layers=options.layers
        ),
    )
    model = PretrainingModel(build_from_config(config, tokenizer)).train()
    step = ContrastiveStep(model, BilingualLoss())
    examples = examples_of(options.batch)
    batches = {"present": collate(examples, tokenizer=tokenizer)}
    batches["padded"] = padded(batches["present"], examples, tokenizer)
    losses = {name: step([batch]).loss.item() for name, batch in batches.items()}
    assert abs(losses["present"] / losses["padded"] - 1) < 1e-5, losses

    def texts_alone(batch: Batch) -> None:
        (head,) = model(None, batch.texts).heads.values()
        torch.stack([each.sum() for each in head.text.values()]).sum().backward()

    found = {
        "text tower": {name: lambda each=each: texts_alone(each) for name, each in batches.items()},
        "whole step": {name: lambda each=each: step([each]) for name, each in batches.items()},
    }
    results = {name: measure(passes, options.repeats) for name, passes in found.items()}
    lengths = {name: list(each.ids.shape) for name, each in batches["padded"].texts.items()}
    rows = [
        [f"{name}, {clock}"]
        + [f"{of[key]:.3f}" for key in ("padded", "present", "ratio")]
        + [f"{of['ratios'][0]:.3f} to {of['ratios'][1]:.3f}"]
        for name, result in results.items()
        for clock, of in result.items()
    ]
    header = ["forward and backward", "padded, s", "present, s", "ratio", "extremes"]
    found = {"losses": losses, "padded_texts": lengths, "results": results}
    leave(setting | found, markdown_table(header, rows), options.out)


if __name__ == "__main__":
    main()
