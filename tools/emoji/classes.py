"""Zero-shot classes of the emoji set, read from the table `classes.yaml` beside this file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassTable:
    """Names of groups and classes by language, and the class of each Unicode subgroup."""

    groups: Mapping[str, Mapping[str, str]]
    """Group to its name in each language."""
    classes: Mapping[str, Mapping[str, str]]
    """Class to its name in each language."""
    class_of_subgroup: Mapping[str, str]
    """Subgroups that belong to no class are left out."""

    def record(self) -> dict[str, Mapping[str, Mapping[str, str]]]:
        """Return what `classes.json` of the data folder says."""
        return {"groups": self.groups, "classes": self.classes}


@cache
def class_table() -> ClassTable:
    """Read the table that ships with the package."""
    text = resources.files("tools.emoji").joinpath("classes.yaml").read_text(encoding="utf-8")
    table = yaml.safe_load(text)
    return ClassTable(
        groups=table["groups"],
        classes={
            name: {"en": entry["en"], "zh": entry["zh"]} for name, entry in table["classes"].items()
        },
        class_of_subgroup={
            subgroup: name
            for name, entry in table["classes"].items()
            for subgroup in entry["subgroups"]
        },
    )
