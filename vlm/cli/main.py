"""The command `vlm`: finds the module of a verb, reads its options, prints errors as one line."""

import difflib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from vlm import __version__
from vlm.errors import InterruptedRunError, VlmError
from vlm.files import FULL_DISK

VERBS = {
    ("quickstart",): ("vlm.cli.quickstart", "train and score a small model on the emoji images"),
    ("train",): ("vlm.cli.train", "train a model; also under `accelerate launch -m vlm train`"),
    ("plot",): ("vlm.cli.plot", "draw training runs and compare them"),
    ("eval", "retrieval"): ("vlm.cli.eval_retrieval", "score a bundle on retrieval"),
    ("eval", "classification"): ("vlm.cli.eval_classification", "score zero-shot classification"),
    ("eval", "table"): ("vlm.cli.eval_table", "compare results, also with published ones"),
    ("eval", "calibrate"): ("vlm.cli.eval_calibrate", "learn which cosines mean a match"),
    ("eval", "index"): ("vlm.cli.eval_index", "compare approximate with exact search"),
    ("embed",): ("vlm.cli.embed", "turn images into vectors"),
    ("index",): ("vlm.cli.index", "make vectors searchable"),
    ("search",): ("vlm.cli.search", "find images by a text or an image"),
    ("tokenizer", "report"): ("vlm.cli.tokenizer_report", "compare tokenizers on captions"),
    ("tokenizer", "import"): ("vlm.cli.tokenizer_import", "read another project's tokenizer"),
    ("tokenizer", "extend"): ("vlm.cli.tokenizer_extend", "add Chinese pieces to a tokenizer"),
    ("tokenizer", "train"): ("vlm.cli.tokenizer_train", "train a bilingual tokenizer"),
    ("tokenizer", "export"): ("vlm.cli.tokenizer_export", "write a fast tokenizer of the same ids"),
    ("tokenizer", "prune"): ("vlm.cli.tokenizer_prune", "keep only the pieces that texts use"),
    ("convert",): ("vlm.cli.convert", "read or write other projects' checkpoints"),
    ("grow",): ("vlm.cli.grow", "let a model read an extended tokenizer and longer texts"),
    ("data", "show"): ("vlm.cli.data_show", "show how your own data is understood"),
    ("data", "index"): ("vlm.cli.data_index", "index your own data, with a manifest of tars"),
    ("data", "check"): ("vlm.cli.data_check", "read and verify every sample of a source"),
}
"""Every verb with the module that runs it: a dataclass `Options`, and `run(options)`."""


_LAUNCHED = {("train",), ("eval", "retrieval"), ("eval", "classification")}
"""The verbs that several processes can share."""


_FIRST_S = 2.0
"""Seconds that other ranks leave to the first, whose end may end them: mostly all fail alike."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 after an error of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        _run(words)
        sys.stdout.flush()
    except InterruptedRunError as error:
        if not _rank():  # every rank has the same to say
            print(f"vlm: {error}", file=sys.stderr)
        return error.exit_code
    except VlmError as error:
        _say(f"vlm: {_without_number(error)}")
        return 2
    except BrokenPipeError:
        # Whoever read the output has enough of it; the interpreter must not try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"vlm: no space left to write: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlm: interrupted", file=sys.stderr)
        return 130
    return 0


def _say(sentence: str) -> None:
    """Print an error, which all ranks mostly have alike, once where that can be.

    torchrun, and `accelerate launch` over it, end with a page on the ranks that failed. It has for
    each what that has left in a file: there are the sentences of the others.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))
    if _rank() and not file:
        time.sleep(_FIRST_S)
    if not (_rank() and file):
        print(sentence, file=sys.stderr)


def _rank() -> int:
    """Return this process's rank, from the launcher's variable."""
    return int(os.environ.get("RANK", "0"))


def command() -> NoReturn:
    """Be the command of a shell, which ends with its process."""
    code = main()
    if sys.argv[1:2] == ["search"]:
        os._exit(code)  # nothing is open, and taking its modules apart is a tenth of a search
    sys.exit(code)


def _run(words: Sequence[str]) -> None:
    family = [verb for verb in VERBS if len(verb) > 1 and [verb[0]] == list(words[:1])]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(list(VERBS)))
        return
    if family and words[1:] in (["-h"], ["--help"], ["help"]):
        print(_overview(family))
        return
    if words[0] == "--version":
        print(f"vlm {__version__}")
        return
    verb = next((v for v in VERBS if tuple(words[: len(v)]) == v), None)
    if verb is None:
        raise VlmError(_unknown_verb(words))
    if verb in _LAUNCHED:
        _warn_of_one_process()
    module, words = import_module(VERBS[verb][0]), list(words[len(verb) :])
    from vlm.cli.parsing import parse

    config = getattr(module, "DEFAULT_CONFIG", None)
    if config and config.is_file() and not any(w.startswith("--config") for w in words):
        words = ["--config", str(config), *words]
    prog = f"vlm {' '.join(verb)}"
    module.run(parse(module.Options, words, prog=prog, description=module.__doc__ or ""))


def _warn_of_one_process() -> None:
    """Say that a launcher was asked for several processes and started this one alone.

    `accelerate launch --num_processes 2` does so on a machine without GPUs: it gives the process an
    address at which to meet others, and no number of them.
    """
    asked = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys()
    counts = {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}
    if asked and not counts & os.environ.keys():
        print(
            "warning: `accelerate launch` was asked for several processes, but started one; "
            "without GPUs, use --config_file configs/accelerate/2-cpus.yaml",
            file=sys.stderr,
        )


def _overview(verbs: Sequence[tuple[str, ...]]) -> str:
    width = max(len(" ".join(verb)) for verb in verbs)
    lines = [f"  {' '.join(verb).ljust(width)}  {VERBS[verb][1]}" for verb in verbs]
    return "\n".join(
        ["usage: vlm VERB [options]", "", "verbs:", *lines, "", "`vlm VERB --help` lists options."]
    )


def _unknown_verb(words: Sequence[str]) -> str:
    known = [" ".join(verb) for verb in VERBS]
    family = [name for name in known if name.startswith(f"{words[0]} ")]
    if family and len(words) == 1:
        return f"`vlm {words[0]}` lacks its second word; expected one of {', '.join(family)}"
    asked = " ".join(words[:2]) if family else words[0]
    near = difflib.get_close_matches(" ".join(words[:2]), family or known, n=1)
    near = near or difflib.get_close_matches(words[0], [] if family else known, n=1, cutoff=0.5)
    if near:
        return f"there is no verb {asked!r}; did you mean `vlm {near[0]}`?"
    return f"there is no verb {asked!r}; expected one of {', '.join(family or known)}"


def _without_number(error: VlmError) -> str:
    """Return the message without the system's error number, and with the file named once."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return str(error).replace(str(cause), cause.strerror)
    return str(error)
