"""A text tower that knows which tokens a text has, and not their order."""

from jaxtyping import Float
from torch import Tensor, nn

from vlm.text.tokenizer import TokenBatch


class BagOfTokens(nn.Module):
    """The projected mean of a text's token embeddings.

    The model of Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification", section 2.
    Tokens that tell much come to outweigh others by the length of their embeddings.
    """

    def __init__(self, *, vocab_size: int, width: int, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.text_projection = nn.Linear(width, output_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)  # as CLIP's, and the next too
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)

    def forward(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return one feature a text, not normalised."""
        counted = tokens.mask[:, :, None].to(self.token_embedding.weight.dtype)
        mean = (self.token_embedding(tokens.ids) * counted).sum(dim=1) / counted.sum(dim=1)
        features: Tensor = self.text_projection(mean)
        return features
