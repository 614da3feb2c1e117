"""Language embeddings: the part of a text's feature that its language explains."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LanguageEmbeddings(nn.Module):
    """A vector for each language, added to the text tower's output in training only.

    LangSAMP (Liu et al. 2024, section 3): what distinguishes languages need not be in the tower's
    own features, which become more alike across languages. There a language and a script are two
    vectors; Chinese and English differ in both at once, so that here one vector holds their sum.

    Args:
        languages: The language of each name under which captions come.
        width: Of the features.
    """

    def __init__(self, languages: Mapping[str, str], width: int) -> None:
        super().__init__()
        order = {language: row for row, language in enumerate(dict.fromkeys(languages.values()))}
        self.rows = {name: order[language] for name, language in languages.items()}
        self.vectors = nn.Parameter(torch.zeros(len(order), width))

    def forward(
        self, features: Float[Tensor, "batch width"], name: str
    ) -> Float[Tensor, "batch width"]:
        """Add the language's vector to features that are not normalised yet."""
        return features + self.vectors[self.rows[name]]
