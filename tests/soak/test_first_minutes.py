"""The quickstart in full, and what README's searches find with it."""

import json
import re
import shlex

from tests.support.commands import ROOT, run_vlm, start_vlm

SENSIBLE = {
    "一只猫": r"\bcat\b",
    "a red flower": r"flower|rose|tulip|hibiscus|blossom",
    "下雨天": r"rain|umbrella",
    "something to drink": r"tea|glass|milk|cup|beer|mate|sake|drink|juice|bottle",
    "a birthday cake": r"cake",
    "someone riding a bicycle": r"biking|bicycle",
}
"""What the English name of a picture has that answers a search."""


def searched_for():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    searches = re.findall(r"vlm search runs/quickstart/index --text (.*)$", readme, re.MULTILINE)
    return [shlex.split(words)[0] for words in searches]


def names_found(index):
    """Return the English name of the first picture of each search."""
    found = {}
    for text in searched_for():
        out, _ = run_vlm("search", index, "--text", text, "--k", "1", "--json")
        found[text] = json.loads(out)[0]["captions"]["en"]
    return found


def test_the_first_picture_of_every_search_in_readme_is_what_was_asked_for(tmp_path):
    assert set(searched_for()) == set(SENSIBLE)
    process = start_vlm("quickstart", "--out", tmp_path / "run")
    _, err = process.communicate()
    assert process.returncode == 0, err
    found = names_found(tmp_path / "run" / "index")
    assert {text: name for text, name in found.items() if not re.search(SENSIBLE[text], name)} == {}
