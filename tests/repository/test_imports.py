"""No module of the package imports itself through others, not even inside of a function."""

import ast
from graphlib import TopologicalSorter

from tests.support.commands import ROOT

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "vlm").rglob("*.py"))
}


def imported_by(path):
    """Yield the modules of the package that a file imports at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys() or {node.module}


def test_no_module_imports_itself_through_others():
    graph = {name: set(imported_by(path)) for name, path in MODULES.items()}
    assert graph["vlm.bundle"] >= {"vlm.models.build", "vlm.text.tokenizer"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
