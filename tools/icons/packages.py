"""The packages that the drawings and captions of the icon set come from."""

from tools.packages import Package

CAPTIONS = Package(
    name="@icon-park/svg",
    version="1.4.2",
    sha256="fbd548c2d6c3830a56828c9cf09787d61ce2a74a4f398919059e111de17c504b",
)
COLOR = Package(
    name="@iconify-json/icon-park",
    version="1.2.4",
    sha256="c1a25212a31602aca93c3fa6f6b3288e89b9d7811afc132dfd78506e9d586b6f",
)
OUTLINE = Package(
    name="@iconify-json/icon-park-outline",
    version="1.2.4",
    sha256="e4c29776086e46ed7d113b7d44798a36ca74df6dcfb949da142db34714ab7c8a",
)
SOLID = Package(
    name="@iconify-json/icon-park-solid",
    version="1.2.4",
    sha256="3af17a63c120891842d272ec34b4bec414e6c4801af8158a460b4c3cb4dc1248",
)
TWO_TONE = Package(
    name="@iconify-json/icon-park-twotone",
    version="1.2.4",
    sha256="579560dd7c0e1c6f53297129f3a32cdcf4292871e2c5e82e502840c7ce68eabb",
)
PACKAGES = (CAPTIONS, COLOR, OUTLINE, SOLID, TWO_TONE)
