"""Fixtures of the tests of reports."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def undrawn(monkeypatch):
    """Leave figures undrawn where a test looks at none: they take most of a report's time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"not drawn"))
