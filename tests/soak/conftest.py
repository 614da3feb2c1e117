"""The long counts of the promises in docs/reliability.md, and the file that their results go to."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from setting import describe_setting

from vlm.markdown import markdown_table

Tally = Callable[..., None]

_RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        help="path of the .json and .md files that get the counts; those of other promises stay",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return a function that keeps how often a promise held."""

    def keep(promise: str, what: str, *, held: int, of: int) -> None:
        request.config.stash[_RESULTS][f"{promise} {what}"] = {
            "promise": promise, "what": what, "held": held, "of": of,
            "setting": describe_setting("-m pytest", threads=1),
        }  # fmt: skip
        assert held == of, f"{promise}: {what}: {held} of {of}"

    return keep


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, found = session.config.getoption("--results"), session.config.stash[_RESULTS]
    if path is None or not found:
        return
    file = path.with_suffix(".json")
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results = dict(sorted((known | found).items(), key=lambda item: int(item[0].split()[0][1:])))
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_report(results), encoding="utf-8")


def _report(results: dict[str, Any]) -> str:
    rows = [
        [each["promise"], each["what"], f"{each['held']} of {each['of']}",
         each["setting"]["date"], each["setting"]["commit"][:7],
         f"{each['setting']['cores']}, {each['setting']['cpu']}"]
        for each in results.values()
    ]  # fmt: skip
    setting = next(reversed(results.values()))["setting"]
    return (
        "# The promises, counted\n\n"
        "How often each promise of [reliability.md](../../docs/reliability.md) held, with Python "
        f"{setting['python']}, torch {setting['versions']['torch']}, tiny models, gloo and real "
        "processes and files.\n\n"
        "```\nmake soak\n```\n\n"
        + markdown_table(
            ["promise", "what was counted", "held", "date", "commit", "cores"],
            rows,
            text_columns=6,
        )
        + "\n"
    )
