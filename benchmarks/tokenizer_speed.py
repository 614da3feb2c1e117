"""Turn captions into CLIP's ids with `open_clip.SimpleTokenizer` and with `vlm`, side by side.

The ids of all captions are compared first; one that differs ends the run with 1. Then both take
turns, batch by batch, and children of this same file measure what each takes to build and to
keep. One JSON object goes to stdout, Markdown tables to stderr; `benchmarks/README.md` says what
is counted and how.

It is not called `tokenizers.py`: this folder is the first that every script in it imports from,
and that name is the Rust library's.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from setting import ROOT, describe_setting, leave

DATA = ROOT / "data" / "emoji"
EXTENDED = ROOT / "tokenizers" / "clip-zh"
CHILD_FLAG = "--child"
BATCH = 1024
BATCHES = (BATCH, BATCH // 2, 0)
"""Texts a batch; 0 for all at once. `vlm` does not begin a second thread below 1,024 texts."""
JOINTS = {
    "en": (" and ", ", ", " with a ", " in a ", " next to the ", " on "),
    "zh": ("的", "和", "在", "与", "旁边的", "，"),
}
LENGTHS = {"en": (75, 95), "zh": (16, 20)}
"""Characters of a made caption."""
PEER, OURS, LOADED, WITH_CHINESE = "open_clip", "vlm", "vlm, loaded", "vlm, clip-zh"

Encode = Callable[[list[str]], Any]
Texts = Mapping[str, Sequence[str]]


def make(system: str, folder: Path) -> tuple[Any, Encode]:
    """Build a tokenizer; return it, and what turns texts into rows of 77 ids.

    Args:
        system: One of the names above.
        folder: Where CLIP's tokenizer was saved by `vlm`.
    """
    if system == PEER:
        from open_clip import SimpleTokenizer

        peer = SimpleTokenizer()
        return peer, peer
    from vlm.text.clip_bpe import CONTEXT_LENGTH, clip_tokenizer
    from vlm.text.tokenizer import load_tokenizer

    if system == OURS:
        ours = clip_tokenizer()
    else:
        ours = load_tokenizer(EXTENDED if system == WITH_CHINESE else folder)
    return ours, lambda texts: ours.encode(texts, pad_to=CONTEXT_LENGTH).ids


# Captions.


def captions(sources: Sequence[Path], language: str, made: int) -> list[str]:
    """Return different captions: of the sources, or as many made from data/emoji's."""
    from vlm.data.captions import read_captions

    if sources:
        return list(dict.fromkeys(read_captions(sources, language)))
    names = sorted(set(read_captions([DATA], language)))
    generator = random.Random(0)
    least, most = LENGTHS[language]
    sentences: dict[str, None] = {}
    while len(sentences) < made:
        text = generator.choice(names)
        while len(text) < least:
            text += generator.choice(JOINTS[language]) + generator.choice(names)
        if len(text) <= most:
            sentences[text] = None
    return list(sentences)


def in_batches(texts: Texts, size: int) -> Iterator[tuple[str, list[str]]]:
    """Give batches of one language each, the languages in turn; 0 for one batch of all."""
    for start in count(0, size) if size else (0,):
        batches = [
            (language, list(own[start : start + (size or len(own))]))
            for language, own in texts.items()
        ]
        if not any(batch for _, batch in batches):
            return
        yield from ((language, batch) for language, batch in batches if batch)


# Equality and speed.


def difference(texts: Texts, folder: Path) -> str | None:
    """Return the first caption with other ids than open_clip's, and both; None if all agree."""
    (_, theirs), *ours = (make(system, folder) for system in (PEER, OURS, LOADED))
    for _, batch in in_batches(texts, BATCH):
        expected = theirs(batch)
        for _, encode in ours:
            found = encode(batch)
            if found.shape != expected.shape or found.dtype != expected.dtype:
                return f"{found.shape} {found.dtype}; expected {expected.shape} {expected.dtype}"
            rows = (found != expected).any(dim=1).nonzero()
            if len(rows):
                row = int(rows[0])
                ids = [each[row][: each[row].argmax() + 1].tolist() for each in (found, expected)]
                return f"{batch[row]!r}: {OURS} gives {ids[0]}; expected {PEER}'s {ids[1]}"
    return None


def race(
    encoders: Mapping[str, Encode], texts: Texts, size: int, first: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return wall and CPU seconds by language and system, which take turns batch by batch.

    Args:
        encoders: The systems.
        texts: What they encode.
        size: Texts a batch; 0 for all.
        first: Which of the systems begins; it changes from batch to batch.
    """
    names = list(encoders)
    spent = {(language, name): (0.0, 0.0) for language in texts for name in names}
    for turn, (language, batch) in enumerate(in_batches(texts, size), start=first * len(texts)):
        for place in range(len(names)):
            name = names[(turn // len(texts) + place) % len(names)]
            started, used = time.perf_counter(), time.process_time()
            encoders[name](batch)
            wall, cpu = time.perf_counter() - started, time.process_time() - used
            before = spent[language, name]
            spent[language, name] = (before[0] + wall, before[1] + cpu)
    return spent


def measure(
    systems: Sequence[str], texts: Texts, warm_up: Texts, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for every language, size of batch, and captions new or seen before.

    Every round builds new tokenizers, so that every round's captions are new to them, and lets
    them see others first, so that the words are not.
    """
    spent: dict[tuple[int, str], list[dict[tuple[str, str], tuple[float, float]]]] = {}
    for number in range(rounds):
        for size in BATCHES:
            # Ours is read from its folder, which is sooner than built anew and the same.
            encoders = {
                system: make(LOADED if system == OURS else system, folder)[1] for system in systems
            }
            race(encoders, warm_up, BATCH, number)
            for state in ("new", "again"):
                spent.setdefault((size, state), []).append(race(encoders, texts, size, number))
    rows = []
    for language, own in texts.items():
        for (size, state), found in spent.items():
            of_language = [{name: each[language, name] for name in systems} for each in found]
            row = {"language": language, "batch": size, "captions": state}
            rows.append(row | speeds(of_language, len(own)))
    return rows


def speeds(
    rounds: Sequence[Mapping[str, tuple[float, float]]], captions: int
) -> dict[str, dict[str, Any]]:
    """Return captions a second by system, and the factors to open_clip's of the same round."""
    wall, cpu = (
        {
            system: [each[PEER][kind] / each[system][kind] for each in rounds]
            for system in rounds[0]
            if system != PEER
        }
        for kind in (0, 1)
    )
    return {
        "per_s": {
            system: captions / statistics.median(each[system][0] for each in rounds)
            for system in rounds[0]
        },
        "factor": {name: [statistics.median(v), min(v), max(v)] for name, v in wall.items()},
        "factor_cpu": {name: [statistics.median(v), min(v), max(v)] for name, v in cpu.items()},
    }


# Building and memory, in children.


def status_mib(key: str) -> float:
    """Return a size of this process as Linux tells it: `VmRSS` now, `VmHWM` the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def in_use() -> float:
    """Return the MiB of this process without memory that is free but not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status_mib("VmRSS")


def keep(system: str, folder: Path) -> dict[str, float]:
    """Build one tokenizer, let it encode everything, and return what that took, in MiB.

    The libraries of both systems are there before and are not counted. Linux with glibc only.
    """
    import open_clip  # noqa: F401

    import vlm.text.clip_bpe  # noqa: F401

    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    before = in_use()
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    started = time.perf_counter()
    tokenizer, encode = make(system, folder)
    found = {"build_s": time.perf_counter() - started, "built": in_use() - before}
    for _, batch in in_batches(texts, BATCH):
        encode(batch)
    found |= {"peak": status_mib("VmHWM") - before, "used": in_use() - before}
    if system == PEER:
        cache = tokenizer.cache
        strings = {id(text): sys.getsizeof(text) for pair in cache.items() for text in pair}
        size = sys.getsizeof(cache) + sum(strings.values())
        found |= {"cache_entries": len(cache), "cache": size / 2**20}
    return found


def memory(systems: Sequence[str], folder: Path, children: int) -> dict[str, dict[str, float]]:
    """Return the medians over children of what each system takes."""
    table = {}
    for system in systems:
        command = [sys.executable, str(Path(__file__).resolve()), CHILD_FLAG, system, str(folder)]
        found = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(children)
        ]
        table[system] = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return table


# Tables.


def speed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return captions a second as Markdown; factors with both extremes of the rounds."""
    systems = list(rows[0]["per_s"])
    lines = [
        f"| captions | batch | {' | '.join(f'{system}, 1/s' for system in systems)} "
        f"| {OURS} / {PEER} | in CPU time |",
        f"| --- | ---: |{' ---: |' * len(systems)} ---: | ---: |",
    ]
    for row in rows:
        cells = [f"{row['language']}, {row['captions']}", f"{row['batch'] or 'all'}"]
        cells += [f"{row['per_s'][system]:,.0f}" for system in systems]
        for key in ("factor", "factor_cpu"):
            middle, least, most = row[key][OURS]
            cells.append(f"{middle:.2f}x ({least:.2f} to {most:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Return what each system takes as Markdown."""
    lines = [
        "| tokenizer | seconds to build | MiB built | MiB after all captions | MiB at most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {system} | {row['build_s']:.2f} | {row['built']:.1f} | {row['used']:.1f} "
        f"| {row['peak']:.1f} |"
        for system, row in table.items()
    ]
    cache = table[PEER]
    entries, size = cache["cache_entries"], cache["cache"]
    return "\n".join(lines) + f"\n\n{PEER}'s word cache: {entries:,} entries, {size:.1f} MiB"


def main() -> None:
    """Compare, measure and print."""
    logging.getLogger("vlm").setLevel(logging.ERROR)  # every tokenizer would say that it cuts texts
    if sys.argv[1:2] == [CHILD_FLAG]:
        print(json.dumps(keep(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for language, name in (("en", "English"), ("zh", "Chinese")):
        parser.add_argument(
            f"--{language}", type=Path, nargs="+", default=[], metavar="FILE",
            help=f"{name} captions, one a line; default: made from data/emoji",
        )  # fmt: skip
    parser.add_argument("--texts", type=int, default=20_000, help="made captions a language")
    parser.add_argument("--rounds", type=int, default=5, help="of timing all captions")
    parser.add_argument("--children", type=int, default=3, help="processes to measure memory in")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    import torch

    from vlm.text.clip_bpe import clip_tokenizer

    torch.set_num_threads(1)  # more do not speed either up, but spin, which counts as CPU time
    setting = describe_setting("benchmarks/tokenizer_speed.py", threads=os.cpu_count() or 1)
    setting["versions"] |= {each: version(each) for each in ("tokenizers", "ftfy", "regex")}
    found = {
        language: captions(getattr(options, language), language, options.texts * 5 // 4)
        for language in ("en", "zh")
    }
    warm_up = {language: own[::5] for language, own in found.items()}
    texts = {
        language: [text for place, text in enumerate(own) if place % 5]
        for language, own in found.items()
    }
    extended = [WITH_CHINESE] if EXTENDED.is_dir() else []
    with tempfile.TemporaryDirectory(prefix="tokenizers_") as name:
        folder = Path(name)
        clip_tokenizer().save(folder)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        wrong = difference(found, folder)
        if wrong:
            raise SystemExit(wrong)
        rows = measure([PEER, OURS, *extended], texts, warm_up, folder, options.rounds)
        kept = memory([PEER, OURS, LOADED, *extended], folder, options.children)
    shape = {
        language: {
            "texts": len(own),
            "warm_up": len(warm_up[language]),
            "characters": statistics.mean(map(len, own)),
        }
        for language, own in texts.items()
    }
    result = {"texts": shape, "rounds": options.rounds, "speed": rows, "memory_mib": kept}
    leave(setting | result, "\n".join([speed_table(rows), memory_table(kept)]), options.out)


if __name__ == "__main__":
    main()
