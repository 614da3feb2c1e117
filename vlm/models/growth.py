"""Text towers with a grown vocabulary or context: what new rows and positions start as."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm.distributed.sharding import local
from vlm.errors import ConfigError, TokenizerError
from vlm.models.config import PositionGrowth
from vlm.models.text_tower import check_reads_to_end_of_text

KEPT_POSITIONS = 20
"""Positions that short captions have trained well (Zhang et al. 2024, "Long-CLIP")."""


@torch.no_grad()
def random_rows(
    old: Float[Tensor, "vocabulary width"], count: int, *, seed: int
) -> Float[Tensor, "count width"]:
    """Draw rows from the normal distribution with the mean and covariance of the old ones.

    Hewitt 2021, "Initializing new word embeddings for pretrained language models". His program
    shrinks the covariance by 1e-5, all but to the mean, lest new words disturb what a language
    model predicts. A text tower predicts no words, and the whole covariance keeps new
    rows distinct.

    The root of the covariance is the symmetric one. It is unique even where eigenvectors are
    not, so a seed draws the same rows on every machine, up to rounding. There is at least one old
    row; torch's own generator is left as it was.
    """
    rows = old.double().cpu()
    mean = rows.mean(dim=0)
    centred = rows - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    root: Tensor = axes * variances.clamp(min=0).sqrt() @ axes.T
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, rows.shape[1], dtype=torch.float64, generator=generator)
    return (mean + noise @ root).to(old)


@torch.no_grad()
def mean_rows(
    old: Float[Tensor, "vocabulary width"], sources: Sequence[Sequence[int]]
) -> Float[Tensor, "count width"]:
    """Make each new row the mean of old rows, in which an id that is given twice counts twice.

    With the pieces into which the old tokenizer splits each new piece, this is zip-tie embedding
    (Chen and Li 2024, "Bailong"); with the ids of a translation, initialisation by a lexicon.

    Raises:
        TokenizerError: a new row has no sources, or an id that is not in the vocabulary.
    """
    for row, ids in enumerate(sources):
        if not ids:
            raise TokenizerError(f"new row {row} has no sources; expected one old id or more")
        _check_ids(ids, len(old), f"new row {row} is made of")
    flat = torch.tensor(list(chain.from_iterable(sources)), dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in sources], dtype=torch.int64)
    offsets = lengths.cumsum(dim=0) - lengths
    means = F.embedding_bag(flat.to(old.device), old.double(), offsets.to(old.device), mode="mean")
    return means.to(old)


@torch.no_grad()
def similar_rows(
    old: Float[Tensor, "vocabulary width"],
    old_vectors: Float[Tensor, "vocabulary auxiliary"],
    new_vectors: Float[Tensor, "count auxiliary"],
    *,
    neighbours: int | None = 10,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> Float[Tensor, "count width"]:
    """Make each new row a mean of the old rows that another space of vectors says are similar.

    With a number of neighbours this is OFA (Liu et al. 2024, section 3): the weights are
    `softmax(cosine / temperature)` over the nearest by cosine; 10 and 0.1 are its settings.

    With `neighbours=None` it is CLP-Transfer (Ostendorff and Rehm 2023): the weights of all old
    rows are proportional to their cosines. That negative ones count as zero is ours; the
    authors' program divides by the plain sum, which may be near zero or below.

    Args:
        old: Rows of the old vocabulary.
        old_vectors: Their vectors in the other space; zeros where unknown, and such rows are
            never neighbours, which is ours too.
        new_vectors: Vectors of the new rows, none of them zeros.
        neighbours: How many old rows to average, at least 1, or fewer where fewer are known;
            None for all.
        temperature: More than 0; the smaller, the more the nearest row prevails.
        chunk: New rows that are compared at a time; memory is `chunk * vocabulary` numbers.

    Raises:
        ConfigError: `neighbours` or `temperature` is out of range.
        TokenizerError: a vector is not finite, new vectors or all old ones are zeros, or, where
            all old rows are averaged, a new one has no positive cosine with any.
    """
    if not temperature > 0 or (neighbours is not None and neighbours < 1):
        raise ConfigError(
            f"neighbours is {neighbours} and temperature {temperature}; "
            "expected at least 1 and more than 0"
        )
    unknown = int((~new_vectors.any(dim=1)).sum())
    if unknown:
        raise TokenizerError(
            f"{unknown} of {len(new_vectors)} new rows have a vector of zeros; "
            "expected known vectors only"
        )
    known = old_vectors.any(dim=1)
    if not known.any():
        raise TokenizerError(f"the vectors of all {len(old)} old rows are zeros")
    rows = old[known].to(torch.promote_types(old.dtype, torch.float32))
    candidates, queries = _unit_vectors(old_vectors[known]), _unit_vectors(new_vectors)
    means = []
    for part in torch.split(queries, chunk):
        cosines = part @ candidates.T
        if neighbours is None:
            means.append(_proportional_mean(cosines, rows))
            continue
        cosines, nearest = cosines.topk(min(neighbours, len(rows)), dim=1)
        weights = (cosines / temperature).softmax(dim=1).to(rows.dtype)
        means.append(F.embedding_bag(nearest, rows, per_sample_weights=weights, mode="sum"))
    return torch.cat(means).to(old.dtype)


@torch.no_grad()
def low_rank(
    old: Float[Tensor, "vocabulary width"], rank: int
) -> Float[Tensor, "vocabulary width"]:
    """Return the nearest matrix of a rank, that of the truncated singular value decomposition.

    OFA's option (Liu et al. 2024, section 3) factorises the old rows into coordinates
    `U_k` and a basis `S_k V_k^T`, averages coordinates, and multiplies by the basis. Averaging is
    linear, so `similar_rows(low_rank(old, rank), ...)` gives the same rows. OFA then goes on to
    train the two factors; here the embedding stays one matrix.

    Raises:
        ConfigError: the rank is not in [1, width].
    """
    width = old.shape[1]
    if not 1 <= rank <= width:
        raise ConfigError(f"the rank is {rank}; expected 1 to {width}, the width of the rows")
    rows = old.double()
    # The right singular vectors of the rows are the eigenvectors of their Gram matrix.
    axes: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors  # the strongest last
    basis = axes[:, width - rank :]
    return (rows @ basis @ basis.T).to(old.dtype)


@torch.no_grad()
def grow_positions(
    old: Float[Tensor, "positions width"], length: int, how: PositionGrowth, *, seed: int = 0
) -> Float[Tensor, "length width"]:
    """Return the positional embedding of a longer context; the old length gives a copy.

    * `append` keeps every old position, as Taiyi-Diffusion-XL does (Wu et al. 2024). How new
      ones start is ours: as `random_rows` of the later half of the old ones, which new
      positions are nearer to than to the first few. Only this one draws, by the seed.
    * `interpolate` stretches all positions linearly; the two end points are kept.
    * `keep-head-stretch-tail` keeps the first 20 and stretches the others linearly, Long-CLIP's
      knowledge-preserved stretching (Zhang et al. 2024, section 3). There the ratio is 4, and
      the authors' program extrapolates the last three positions; here the ratio follows from
      the length, and the last position is kept.

    Raises:
        ConfigError: the new context is shorter than the old one, or the old one has no tail.
    """
    positions = len(old)
    if length < positions:
        raise ConfigError(
            f"a context of {length} positions is shorter than the {positions} that there are; "
            f"expected {positions} or more"
        )
    if length == positions:
        return old.clone()
    if how == "append":
        appended = random_rows(old[positions // 2 :], length - positions, seed=seed)
        return torch.cat([old, appended])
    if how == "interpolate":
        return _stretched(old, length)
    if positions <= KEPT_POSITIONS:
        raise ConfigError(
            f"{how} keeps {KEPT_POSITIONS} positions and stretches the others, but there are "
            f"{positions}; expected append or interpolate"
        )
    head, tail = old[:KEPT_POSITIONS], old[KEPT_POSITIONS:]
    return torch.cat([head, _stretched(tail, length - KEPT_POSITIONS)])


def grow_text_tower(
    tower: TextTransformer,
    *,
    new_rows: Float[Tensor, "count width"],
    positions: Float[Tensor, "positions width"] | None,
) -> None:
    """Give a text tower more token ids, and positions for another context, in place.

    Old ids keep their rows bit for bit, types and devices stay. Parameters are replaced: build
    the optimizer afterwards. `encode_tokens` pools by the mask and reads old texts as before. A
    tower that pools by `argmax` takes the highest id for the end of text, which a new id now is:
    open_clip's own forward pass needs `pool_type = "eos"` and `eos_id` from here on.
    `positions` is the whole new positional embedding; None keeps the old one.

    Raises:
        ConfigError: the tower is not one that `encode_tokens` can run.
    """
    check_reads_to_end_of_text(tower)
    weight = tower.token_embedding.weight.detach()
    _replace_token_embedding(tower, torch.cat([weight, new_rows.detach().to(weight)]))
    if positions is None:
        return
    old = tower.positional_embedding
    tower.positional_embedding = nn.Parameter(
        positions.detach().to(old, copy=True), requires_grad=old.requires_grad
    )
    tower.num_pos = tower.context_length = len(positions)
    tower.attn_mask = tower.build_causal_mask().to(tower.attn_mask)


def shrink_token_embedding(tower: TextTransformer, kept: Sequence[int]) -> None:
    """Leave a text tower with some of its token ids, in place; parameters are replaced.

    Place i of `kept`, a list of old ids, becomes id i. `eos_id` follows the id that it names. A
    tower that pools by `argmax` names none: open_clip's own forward pass then needs the end of
    text to be the last of those kept.

    Raises:
        ConfigError: the tower is not one that `encode_tokens` can run.
        TokenizerError: an id is not in the vocabulary, or the id that the tower pools at goes.
    """
    check_reads_to_end_of_text(tower)
    weight = tower.token_embedding.weight.detach()
    _check_ids(kept, len(weight), "the kept ids hold")
    if tower.pool_type == "eos":
        if tower.eos_id not in kept:
            raise TokenizerError(
                f"the tower pools at id {tower.eos_id}, the end of text; expected it to be kept"
            )
        tower.eos_id = kept.index(tower.eos_id)
    ids = torch.tensor(kept, dtype=torch.int64, device=weight.device)
    _replace_token_embedding(tower, weight[ids])


def own_rows_before(row: int, weight: Tensor) -> int:
    """Return how many of the rows that this rank holds of a tensor come before a row of it."""
    rows = torch.arange(len(weight))
    if isinstance(weight, DTensor):  # no communication: every rank numbers all rows
        mesh, placements = weight.device_mesh, weight.placements
        rows = distribute_tensor(rows, mesh, placements, src_data_rank=None).to_local()
    return int((rows < row).sum())


@contextmanager
def only_new_rows(weight: Tensor, old_rows: int) -> Iterator[None]:
    """Let an optimizer's step change an embedding's rows from `old_rows` on and no others.

    Wrap what comes between the backward pass and `zero_grad`, clipping as well, so that the norm
    is that of what trains. Old rows get gradients of zero and are put back afterwards, bit for bit:
    decoupled weight decay needs no gradient. `weight` may be sharded: `own_rows_before` says how
    many of a rank's rows are old.
    """
    rows = local(weight.detach())
    if weight.grad is not None:
        local(weight.grad)[:old_rows] = 0
    old = rows[:old_rows].clone()
    yield
    rows[:old_rows] = old


def _check_ids(ids: Sequence[int], vocabulary: int, what: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(each for each in ids if not 0 <= each < vocabulary)
        raise TokenizerError(f"{what} id {wrong}; expected ids in [0, {vocabulary})")


def _unit_vectors(
    vectors: Float[Tensor, "count auxiliary"],
) -> Float[Tensor, "count auxiliary"]:
    if not vectors.isfinite().all():
        raise TokenizerError("a vector that similarity goes by is not finite")
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    # By the largest entry first: squares of very small ones would vanish.
    return F.normalize(vectors / vectors.abs().amax(dim=1, keepdim=True), dim=1)


def _proportional_mean(
    cosines: Float[Tensor, "part known"], rows: Float[Tensor, "known width"]
) -> Float[Tensor, "part width"]:
    weights = cosines.clamp(min=0).to(rows.dtype)
    total = weights.sum(dim=1, keepdim=True)
    if not total.all():
        raise TokenizerError(
            f"{int((total == 0).sum())} new rows have no positive cosine with any old row; "
            "expected one or more"
        )
    return weights / total @ rows


def _stretched(
    rows: Float[Tensor, "positions width"], length: int
) -> Float[Tensor, "length width"]:
    stretched = F.interpolate(rows.double().T[None], size=length, mode="linear", align_corners=True)
    return stretched[0].T.to(rows.dtype).contiguous()


def _replace_token_embedding(
    tower: TextTransformer, rows: Float[Tensor, "vocabulary width"]
) -> None:
    embedding = tower.token_embedding
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = tower.vocab_size = len(rows)
