"""Every command and every Python block that README and docs show runs as it is shown."""

import json
import re
import shlex
import shutil

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from tests.builders import THINGS, make_image, write_img2dataset
from tests.support.commands import ROOT, run_vlm

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tokenizers/README.md"]

SHORTER = {
    "train": ["--schedule.steps", "4", "--schedule.warmup_steps", "1", "--data.batch_size", "16",
              "--data.workers", "0", "--evaluation.every_steps", "0"],
}  # fmt: skip
"""Options added to a command so that it takes seconds."""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def workspace(quickstart, small_emoji):
    """A clone as a reader has it after the quickstart, with what the pages' capitals stand for.

    Its `data/emoji` is a quarter of the shipped one.
    """
    folder = quickstart[0].parents[1]
    for name in ("configs", "tokenizers"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(small_emoji, folder / "data/emoji")
    shutil.copytree(ROOT / "data/icons", folder / "data/icons")
    (folder / "IMAGES").mkdir()
    Image.new("RGB", (40, 30), "orange").save(folder / "IMAGES" / "one.jpg")
    shutil.copytree(small_emoji, folder / "FOLDER", ignore=shutil.ignore_patterns("train*"))
    (folder / "FOLDER" / "manifest.json").unlink()
    write_img2dataset(
        folder / "TARS", [text for pair in THINGS for text in pair], samples_per_shard=8
    )
    rows = ["image,caption_zh,caption_en"]
    for number, (en, zh) in enumerate(THINGS * 2):
        make_image(number).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{zh},{en}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), PYTHON, ids=lambda value: getattr(value, "name", ""))
def test_python_blocks_run(workspace, monkeypatch, page, block):
    monkeypatch.chdir(workspace)
    exec(compile(block, str(page), "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run_in_the_order_of_the_page(workspace, page):
    shutil.rmtree(workspace / "runs/emoji", ignore_errors=True)
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[0] in ("vlm", ".venv/bin/vlm"):
            shorter = SHORTER.get(words[1], [])
            if "configs/train/emoji-zh-kept.yaml" in words:
                stages = [{"steps": 2, "trained": "new_rows"}, {"trained": "all"}]
                shorter = [*shorter, "--stages", json.dumps(stages)]
            if words[1:3] == ["tokenizer", "train"]:  # fewer captions hold fewer pieces
                shorter = ["--vocab_size", "3000"]
            run_vlm(*words[1:], *shorter, folder=workspace)
        else:
            assert words[:2] == ["accelerate", "launch"], f"nothing runs {command!r}"
            shutil.rmtree(workspace / "runs/emoji", ignore_errors=True)
            # The launcher itself starts the ranks of a test in tests/end_to_end/test_training.py.
            launched = launch_command_parser().parse_args(words[2:])
            assert (launched.module, launched.training_script) == (True, "vlm")
            processes = load_config_from_file(str(ROOT / launched.config_file)).num_processes
            verb = launched.training_script_args
            run_vlm(*verb, *SHORTER.get(verb[0], []), processes=processes, folder=workspace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_checkout_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_architecture_page_names_every_room_and_no_other():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.split("## Rooms of the package")[1].split("Rooms that are planned")[0]
    named = {name.rstrip("/") for name in re.findall(r"^\| `vlm/([\w/.]+)`", table, re.MULTILINE)}
    there = {
        path.name
        for path in (ROOT / "vlm").iterdir()
        if path.name not in ("__pycache__", "__main__.py", "py.typed")
    }
    assert named == there
