"""What each query finds first among all candidates, the same for every tile, process and device."""

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.evaluation.retrieval.tiles import Tile, TiledProducts


@torch.inference_mode()
def nearest(
    queries: Float[np.ndarray, "queries query_dim"],
    candidates: Float[np.ndarray, "candidates candidate_dim"],
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    group: RankGroup | None = None,
    show_progress_bar: bool = False,
) -> Int64[np.ndarray, " queries"]:
    """Return for each query the candidate with the highest product, the first of several.

    Products are compared as `vlm.evaluation.retrieval.ranks` compares them, so that equal vectors
    tie. The arguments are those of `vlm.evaluation.retrieval.ranks.exact_ranks`.

    Returns:
        Rows of the candidates; -1 where there is no product that is a number.

    Raises:
        VlmError: as there.
    """
    no_pairs = np.empty((0, 2), np.int64)
    products = TiledProducts(queries, candidates, no_pairs, tile=tile, device=device)
    group = group or SINGLE
    best = torch.full((len(queries),), -torch.inf, device=products.device)
    found = torch.full((len(queries),), -1, dtype=torch.int64, device=products.device)
    # An approximate product can lie this much below that of a candidate which it equals.
    slack = 2 * products.margin()
    for each in products.tiles(
        group=group, show_progress_bar=show_progress_bar, purpose="finding the first"
    ):
        scores, columns = _best_of_tile(each, best[each.rows], slack)
        better = scores > best[each.rows]  # candidates come in order, so the first one stays
        best[each.rows][better] = scores[better]
        found[each.rows][better] = columns[better] + each.columns.start
    if group.size > 1:  # each query was looked at by one rank, and is -1 on all others
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group.process_group)
    numbers: Int64[np.ndarray, " queries"] = found.cpu().numpy()
    return numbers


def _best_of_tile(
    tile: Tile, best: Float32[Tensor, " rows"], slack: float
) -> tuple[Float32[Tensor, " rows"], Int64[Tensor, " rows"]]:
    """Return the exact highest product of each row of a tile, and the first column that has it.

    Both are worthless in rows that cannot reach the best so far.
    """
    products = tile.products.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bar = torch.maximum(best, products.amax(1)) - slack
    rows, columns = ((products >= bar[:, None]) & (products > -torch.inf)).nonzero(as_tuple=True)
    exact = tile.exact(rows, columns)
    highest = torch.full_like(best, -torch.inf).scatter_reduce(0, rows, exact, "amax")
    ties = exact == highest[rows]
    first = rows.new_full((len(best),), products.shape[1])
    first = first.scatter_reduce(0, rows[ties], columns[ties], "amin")
    return highest, first
