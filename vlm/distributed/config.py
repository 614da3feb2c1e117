"""How ranks are divided into loss groups, and how a group is laid out."""

from typing import Literal

MeshShape = tuple[int, int] | Literal["auto", "text", "image"]
Grouping = Literal["contiguous", "strided"]
