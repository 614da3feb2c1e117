"""What the checkout promises about its own shape."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "vlm").rglob("*.py"))


def test_asset_folders_hold_no_python():
    # An __init__.py in tokenizers/ would hide the package `tokenizers` under `python -m pytest`.
    found = [p for name in ("tokenizers", "data", "configs") for p in (ROOT / name).rglob("*.py")]
    assert not found


def test_importing_vlm_imports_no_torch():
    code = "import sys, vlm; vlm.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_names_are_pinned_and_importable():
    import vlm

    assert sorted(vlm.__all__) == [
        "Embedder", "Tokenizer", "VlmError", "__version__", "evaluate", "evaluate_retrieval",
        "load", "load_tokenizer",
    ]  # fmt: skip
    for name in vlm.__all__:
        assert getattr(vlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlm.nothing  # noqa: B018 - reading the attribute is the test


def test_shapes_are_checked_while_the_tests_run():
    from vlm.search.index import cosines_of

    vectors = np.zeros((2, 4), np.float32)
    with pytest.raises(jaxtyping.TypeCheckError, match="queries dim"):
        cosines_of(np.zeros((2, 1), np.int64), vectors[:, :3], vectors)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_source_file_opens_with_what_it_is_and_stays_readable(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert len(text.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, f"{node.name} is long"


@pytest.mark.parametrize(
    "pattern", [r"pickle\.load", r"torch\.load\((?!.*weights_only=True)", r"allow_pickle=True"]
)
def test_nothing_is_unpickled(pattern):
    found = [path for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert not found


def test_packages_do_not_re_export():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent.name != "vlm":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, f"{path} holds more than its docstring"


def test_large_files_are_data():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    large = [n for n in listed if n and (ROOT / n).stat().st_size > 1_000_000]
    assert all(name.startswith(("data/", "tokenizers/")) for name in large)
