"""The tokenizers that ship are what their commands make, and what their pages say."""

import re
import shlex

import pytest

from tests.support.commands import ROOT
from vlm.cli.main import main
from vlm.text.clip_bpe import clip_tokenizer
from vlm.text.extension import is_extension
from vlm.text.tokenizer import load_tokenizer

FOLDERS = sorted(path.parent for path in (ROOT / "tokenizers").rglob("vlm_tokenizer.json"))


def commands(page):
    """Return the `vlm` commands of a page, in their order."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("vlm ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "name"),
    [("tokenizers/README.md", "emoji-zh-en"), ("tokenizers/clip-zh/README.md", "clip-zh")],
    ids=["emoji-zh-en", "clip-zh"],
)
def test_the_command_of_a_page_makes_the_very_files(tmp_path, monkeypatch, page, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for words in commands(ROOT / page):
        assert main(words) == 0
    made, shipped = (folder / "tokenizers" / name for folder in (tmp_path, ROOT))
    for file in made.iterdir():
        assert file.read_bytes() == (shipped / file.name).read_bytes(), file.name


def test_clip_zh_goes_on_from_clip():
    clip, clip_zh = clip_tokenizer(), load_tokenizer(ROOT / "tokenizers/clip-zh")
    assert is_extension(clip_zh, clip)
    assert clip_zh.vocab_size == clip.vocab_size + 8_000
    assert clip_zh.context_length == 77


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_caption_in_both_languages_comes_back(folder):
    tokenizer = load_tokenizer(folder)
    for text in ("一只猫在睡觉", "a sleeping cat", "三只狗和 2 只猫"):
        decoded = tokenizer.decode(tokenizer.encode([text]).ids[0].tolist())
        assert decoded.replace(" ", "") == text.replace(" ", "")
