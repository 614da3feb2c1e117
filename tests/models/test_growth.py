import copy

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from tests.support.processes import run_in_processes
from vlm.errors import ConfigError, TokenizerError
from vlm.models.growth import (
    KEPT_POSITIONS,
    grow_positions,
    grow_text_tower,
    low_rank,
    mean_rows,
    only_new_rows,
    random_rows,
    shrink_token_embedding,
    similar_rows,
)
from vlm.models.text_tower import encode_tokens
from vlm.text.tokenizer import TokenBatch

VOCABULARY, CONTEXT, WIDTH = 200, 16, 64
END_OF_TEXT = VOCABULARY - 1
OLD_TEXTS = [[1, 5, 9, END_OF_TEXT], [1, END_OF_TEXT], [1, *range(20, 34), END_OF_TEXT]]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Rows drawn at random


def correlated_rows(count, width, seed=0):
    return normal(count, width, seed=seed) @ normal(width, width, seed=seed + 1) + 3


@pytest.mark.parametrize("vocabulary", [40, 4, 1], ids=["many", "fewer than wide", "one"])
def test_random_rows_have_the_mean_and_covariance_of_the_old_ones(vocabulary):
    old, count = correlated_rows(vocabulary, 6), 200_000
    drawn = random_rows(old, count, seed=3).double().numpy()
    mean, covariance = old.double().numpy().mean(0), np.cov(old.numpy().T, bias=True)
    deviation = np.sqrt(covariance.diagonal().max())
    assert np.abs(drawn.mean(0) - mean).max() <= 5 * deviation / count**0.5 + 1e-6
    error = np.abs(np.cov(drawn.T, bias=True) - covariance).max()
    assert error <= 10 * deviation**2 / count**0.5 + 1e-6


def test_random_rows_of_few_old_ones_differ_from_them_only_where_they_differ():
    old = correlated_rows(4, 16).double()
    drawn = random_rows(old, 50, seed=0) - old.mean(0)
    differences = (old - old.mean(0)).numpy()
    projection = np.linalg.pinv(differences) @ differences
    np.testing.assert_allclose(drawn.numpy() @ projection, drawn.numpy(), atol=1e-6)


def test_a_seed_decides_random_rows_and_torch_keeps_its_own_generator():
    old = correlated_rows(30, 8)
    torch.manual_seed(5)
    first = random_rows(old, 7, seed=1)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, random_rows(old, 7, seed=1))
    assert not torch.isclose(first, random_rows(old, 7, seed=2)).any()


def test_random_rows_do_not_depend_on_which_eigenvectors_a_machine_finds():
    """Equal variances have any axes for eigenvectors; rounding then decides which."""
    old = torch.cat([torch.eye(8), -torch.eye(8)]).double()
    rounded = old + 1e-9 * normal(16, 8, dtype=torch.float64)
    drawn, redrawn = random_rows(old, 20, seed=0), random_rows(rounded, 20, seed=0)
    torch.testing.assert_close(redrawn, drawn, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_rows_have_the_type_of_the_old_ones_and_no_history(dtype):
    old = nn.Parameter(normal(30, 8).to(dtype))
    vectors = normal(30, 4)
    for rows in (
        random_rows(old, 5, seed=0),
        mean_rows(old, [[1, 2]]),
        similar_rows(old, vectors, vectors[:5]),
        low_rank(old, 3),
        grow_positions(old, 40, "append"),
        grow_positions(old, 40, "interpolate"),
        grow_positions(old, 40, "keep-head-stretch-tail"),
        grow_positions(old, 30, "append"),
    ):
        assert rows.dtype == dtype
        assert not rows.requires_grad
        assert rows.is_contiguous()  # or safetensors would not store it


# Means of rows that are named


def test_a_row_of_sources_is_their_mean():
    old = normal(50, 8) * 100
    sources = [[3], [0, 49], [7, 7, 8], list(range(50))]
    expected = [np.mean([old[i].double().numpy() for i in ids], axis=0) for ids in sources]
    np.testing.assert_allclose(mean_rows(old, sources).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_means_of_half_precision_rows_are_rounded_once():
    old = (normal(300, 4) + 100).to(torch.bfloat16)
    exact = old.double().mean(0).to(torch.bfloat16)
    assert torch.equal(mean_rows(old, [list(range(300))])[0], exact)


def test_no_sources_at_all_make_no_rows():
    assert mean_rows(normal(5, 3), []).shape == (0, 3)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([[1], [], [2]], "new row 1 has no sources; expected one old id or more"),
        ([[1], [4, 5, -9]], r"new row 1 is made of id 5; expected ids in \[0, 5\)"),
        ([[-1]], r"new row 0 is made of id -1; expected ids in \[0, 5\)"),
    ],
)
def test_sources_that_are_missing_or_unknown_are_refused(sources, message):
    with pytest.raises(TokenizerError, match=message):
        mean_rows(normal(5, 3), sources)


# Means of rows that are similar


def similar_rows_by_definition(old, old_vectors, new_vectors, neighbours, temperature):
    old, old_vectors, new_vectors = (x.double().numpy() for x in (old, old_vectors, new_vectors))
    rows = []
    for vector in new_vectors:
        cosines = {
            i: vector @ other / np.linalg.norm(vector) / np.linalg.norm(other)
            for i, other in enumerate(old_vectors)
            if np.any(other != 0)
        }
        if neighbours is None:
            weights = {i: max(cosine, 0) for i, cosine in cosines.items()}
        else:
            nearest = sorted(cosines, key=lambda i: -cosines[i])[:neighbours]
            weights = {i: np.exp((cosines[i] - 1) / temperature) for i in nearest}
        row = sum(weight * old[i] for i, weight in weights.items())
        rows.append(row / sum(weights.values()))
    return np.array(rows)


@pytest.mark.parametrize("chunk", [1, 3, 4096])
@pytest.mark.parametrize(
    ("neighbours", "temperature"),
    [(10, 0.1), (1, 0.1), (3, 2.0), (10, 1e-3), (1000, 0.1), (None, 0.1)],
)
def test_similar_rows_are_the_weighted_means_of_their_definition(neighbours, temperature, chunk):
    old, old_vectors, new_vectors = normal(40, 8), normal(40, 5, seed=1), normal(7, 5, seed=2)
    old_vectors[[0, 13]] = 0
    new_vectors[2] *= 1e-30  # its square is none in float32
    found = similar_rows(
        old, old_vectors, new_vectors, neighbours=neighbours, temperature=temperature, chunk=chunk
    )
    expected = similar_rows_by_definition(old, old_vectors, new_vectors, neighbours, temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("neighbours", [5, None])
def test_old_rows_without_a_vector_are_never_neighbours(neighbours):
    old, vectors = normal(5, 4), torch.zeros(5, 3)
    vectors[3] = torch.tensor([1.0, 0, 0])
    found = similar_rows(old, vectors, torch.tensor([[2.0, 1, 0]]), neighbours=neighbours)
    torch.testing.assert_close(found, old[3:4])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda old, new: new[1:3].zero_(), "2 of 4 new rows have a vector of zeros"),
        (lambda old, new: old.zero_(), "the vectors of all 9 old rows are zeros"),
        (lambda old, new: old[2].fill_(torch.nan), "not finite"),
        (lambda old, new: new[2, 0].fill_(torch.inf), "not finite"),
    ],
    ids=["new zeros", "old zeros", "old nan", "new inf"],
)
@pytest.mark.parametrize("neighbours", [2, None])
def test_vectors_that_say_nothing_of_similarity_are_refused(spoil, message, neighbours):
    old_vectors, new_vectors = normal(9, 3, seed=1), normal(4, 3, seed=2)
    spoil(old_vectors, new_vectors)
    with pytest.raises(TokenizerError, match=message):
        similar_rows(normal(9, 5), old_vectors, new_vectors, neighbours=neighbours)


def test_a_new_row_unlike_all_old_ones_has_no_mean_of_them_all():
    vectors = torch.tensor([[1.0, 0], [0, 1]])
    new = torch.tensor([[1.0, 1], [-1, -1]])
    with pytest.raises(TokenizerError, match="1 new rows have no positive cosine"):
        similar_rows(normal(2, 4), vectors, new, neighbours=None)
    assert similar_rows(normal(2, 4), vectors, new).isfinite().all()


@pytest.mark.parametrize(
    "settings", [{"neighbours": 0}, {"temperature": 0.0}, {"temperature": float("nan")}]
)
def test_neighbours_and_temperatures_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match="expected at least 1 and more than 0"):
        similar_rows(normal(9, 5), normal(9, 3), normal(2, 3), **settings)


@pytest.mark.parametrize("shape", [(40, 8), (5, 8)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_is_the_truncated_singular_value_decomposition(shape, rank):
    old = normal(*shape)
    left, values, right = np.linalg.svd(old.double().numpy(), full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(low_rank(old, rank).numpy(), expected, atol=1e-6)


def test_similar_rows_of_low_rank_are_means_of_coordinates_times_the_basis():
    """Averaging is linear: OFA's factorised form gives the same rows."""
    old, vectors, new = normal(40, 8), normal(40, 5, seed=1), normal(7, 5, seed=2)
    left, values, right = torch.linalg.svd(old, full_matrices=False)
    coordinates, basis = left[:, :3], values[:3, None] * right[:3]
    expected = similar_rows(coordinates, vectors, new) @ basis
    torch.testing.assert_close(similar_rows(low_rank(old, 3), vectors, new), expected)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_rows_cannot_have_is_refused(rank):
    with pytest.raises(ConfigError, match="expected 1 to 8, the width of the rows"):
        low_rank(normal(40, 8), rank)


# Positions


def stretched_by_definition(rows, length):
    places = np.linspace(0, len(rows) - 1, length)
    columns = [np.interp(places, range(len(rows)), column) for column in rows.double().numpy().T]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("how", ["append", "interpolate", "keep-head-stretch-tail"])
def test_an_equal_length_gives_a_copy(how):
    old = normal(12, 8)
    grown = grow_positions(old, 12, how)
    assert torch.equal(grown, old)
    assert grown.data_ptr() != old.data_ptr()


@pytest.mark.parametrize("how", ["append", "interpolate", "keep-head-stretch-tail"])
def test_a_shorter_context_is_refused(how):
    with pytest.raises(ConfigError, match="a context of 29 positions is shorter than the 30"):
        grow_positions(normal(30, 8), 29, how)


@pytest.mark.parametrize(("positions", "length"), [(1, 5), (16, 24), (77, 78)])
def test_appended_positions_leave_the_old_ones_bit_for_bit(positions, length):
    old = normal(positions, 8)
    grown = grow_positions(old, length, "append", seed=1)
    assert grown.shape == (length, 8)
    assert torch.equal(grown[:positions], old)
    assert torch.equal(grown, grow_positions(old, length, "append", seed=1))


def test_appended_positions_resemble_the_later_half_of_the_old_ones():
    old = correlated_rows(20, 4)
    old[:10] += 1000  # what the first positions are like does not matter
    new = grow_positions(old, 100_020, "append")[20:].double().numpy()
    later = old[10:].double().numpy()
    np.testing.assert_allclose(new.mean(0), later.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(new.T), np.cov(later.T, bias=True), atol=0.2)


@pytest.mark.parametrize(("positions", "length"), [(1, 5), (2, 9), (16, 24), (77, 248)])
def test_interpolated_positions_lie_on_the_line_through_the_old_ones(positions, length):
    old = normal(positions, 8)
    grown = grow_positions(old, length, "interpolate")
    np.testing.assert_allclose(grown.numpy(), stretched_by_definition(old, length), atol=1e-6)
    assert torch.equal(grown[[0, -1]], old[[0, -1]])


@pytest.mark.parametrize(("positions", "length"), [(21, 22), (21, 64), (32, 64), (77, 248)])
def test_the_first_twenty_positions_are_kept_and_the_tail_is_stretched(positions, length):
    old = normal(positions, 8)
    grown = grow_positions(old, length, "keep-head-stretch-tail")
    assert KEPT_POSITIONS == 20
    assert torch.equal(grown[:20], old[:20])
    expected = stretched_by_definition(old[20:], length - 20)
    np.testing.assert_allclose(grown[20:].numpy(), expected, atol=1e-6)


def test_a_context_without_a_tail_cannot_have_it_stretched():
    with pytest.raises(ConfigError, match="there are 20; expected append or interpolate"):
        grow_positions(normal(20, 8), 40, "keep-head-stretch-tail")


# Towers


def text_tower(**changes):
    torch.manual_seed(0)
    config = {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": 2,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": END_OF_TEXT,
    } | changes
    return open_clip.CustomTextCLIP(
        32, {"timm_model_name": "test_resnet", "image_size": 32}, config
    ).text


def grown(tower, *, rows=50, context=24):
    tower = copy.deepcopy(tower)
    grow_text_tower(
        tower,
        new_rows=random_rows(tower.token_embedding.weight, rows, seed=0),
        positions=grow_positions(tower.positional_embedding, context, "append"),
    )
    return tower


def batch(texts, length=None):
    length = length or max(len(ids) for ids in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    mask = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = True
    return TokenBatch(ids, mask)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_grown_tower_gives_old_texts_the_features_they_had(layers):
    tower = text_tower(layers=layers)
    larger = grown(tower)
    tokens = batch(OLD_TEXTS)
    assert torch.equal(encode_tokens(larger, tokens), encode_tokens(tower, tokens))
    by_open_clip = larger(batch(OLD_TEXTS, 24).ids)
    torch.testing.assert_close(by_open_clip, tower(tokens.ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_open_clip, encode_tokens(tower, tokens), rtol=1e-5, atol=1e-6)


def test_a_grown_tower_gives_old_texts_the_gradients_they_had_and_new_rows_none():
    tower, tokens = text_tower().double(), batch(OLD_TEXTS)
    larger = grown(tower)
    weight = normal(3, 32, dtype=torch.float64)
    for each in (tower, larger):
        (encode_tokens(each, tokens) * weight).sum().backward()
    found = {name: parameter.grad for name, parameter in larger.named_parameters()}
    for name, parameter in tower.named_parameters():
        if name in ("token_embedding.weight", "positional_embedding"):
            assert not found[name][len(parameter) :].any()
        kept = found[name][: len(parameter)]
        torch.testing.assert_close(kept, parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_grown_tower_reads_new_ids_and_longer_texts_and_learns_from_them():
    tower = grown(text_tower())
    text = [1, VOCABULARY, *range(10, 30), VOCABULARY + 49, END_OF_TEXT]
    assert len(text) == 24
    features = encode_tokens(tower, batch([text]))
    torch.testing.assert_close(tower(batch([text]).ids), features, rtol=1e-5, atol=1e-6)
    features.sum().backward()
    learned = tower.token_embedding.weight.grad.any(dim=1).nonzero().flatten().tolist()
    assert learned == sorted(text)
    assert tower.positional_embedding.grad.any(dim=1).all()


def test_a_grown_tower_is_the_tower_that_open_clip_builds_at_its_size():
    larger = grown(text_tower())
    fresh = text_tower(vocab_size=250, context_length=24)
    fresh.load_state_dict(larger.state_dict())
    for name in ("vocab_size", "context_length", "num_pos"):
        assert getattr(larger, name) == getattr(fresh, name), name
    assert larger.token_embedding.num_embeddings == 250
    assert torch.equal(larger.attn_mask, fresh.attn_mask)
    assert "attn_mask" not in larger.state_dict()
    ids = batch([[1, 210, END_OF_TEXT]], 24).ids
    assert torch.equal(larger(ids), fresh(ids))


def test_growth_keeps_types_and_what_is_frozen():
    tower = text_tower().to(torch.bfloat16)
    tower.token_embedding.weight.requires_grad_(False)
    old = tower.token_embedding.weight.clone()
    grow_text_tower(tower, new_rows=normal(3, WIDTH), positions=normal(20, WIDTH))
    assert torch.equal(tower.token_embedding.weight[:VOCABULARY], old)
    kinds = {each.dtype for each in (*tower.parameters(), *tower.buffers())}
    assert kinds == {torch.bfloat16}
    assert not tower.token_embedding.weight.requires_grad
    assert tower.positional_embedding.requires_grad


def test_growth_of_the_vocabulary_alone_keeps_the_context():
    tower = text_tower()
    positions = tower.positional_embedding
    grow_text_tower(tower, new_rows=normal(3, WIDTH), positions=None)
    assert tower.positional_embedding is positions
    assert (tower.vocab_size, tower.context_length) == (VOCABULARY + 3, CONTEXT)


def test_a_grown_tower_shares_no_memory_with_what_it_was_grown_from():
    tower, positions = text_tower(), normal(20, WIDTH)
    grow_text_tower(tower, new_rows=normal(0, WIDTH), positions=positions)
    before = tower.positional_embedding.detach().clone()
    positions.zero_()
    assert torch.equal(tower.positional_embedding, before)


def test_a_tower_that_is_run_wrongly_is_not_grown():
    with pytest.raises(ConfigError, match="causal transformer pooled at the end of text"):
        grow_text_tower(text_tower(no_causal_mask=True), new_rows=normal(3, WIDTH), positions=None)


def test_pooling_at_the_highest_id_breaks_with_ids_above_the_end_of_text():
    """OpenAI's CLIP finds the end of text as the highest id of a text."""
    tower = grown(text_tower(pool_type="argmax"))
    new = VOCABULARY + 10
    texts = [[1, 5, new, 7, 9, END_OF_TEXT], [1, 5, new, 8, END_OF_TEXT], *OLD_TEXTS]
    short, full = batch(texts), batch(texts, 24)
    by_mask, by_highest = encode_tokens(tower, short), tower(full.ids)
    assert torch.equal(by_highest[0], by_highest[1])  # blind to what follows the new id
    assert not torch.isclose(by_mask[0], by_mask[1], atol=1e-3).all()
    torch.testing.assert_close(by_highest[2:], by_mask[2:], rtol=1e-5, atol=1e-6)
    tower.pool_type, tower.eos_id = "eos", END_OF_TEXT
    torch.testing.assert_close(tower(full.ids), by_mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool_type", ["eos", "argmax"])
def test_a_pruned_tower_gives_kept_ids_the_features_they_had(pool_type):
    tower = text_tower(pool_type=pool_type)
    kept = [0, *range(30, 15, -1), 1, 5, 9, *range(31, 40), END_OF_TEXT]
    smaller = copy.deepcopy(tower)
    shrink_token_embedding(smaller, kept)
    texts = [[kept.index(id_) for id_ in text] for text in OLD_TEXTS]
    assert torch.equal(encode_tokens(smaller, batch(texts)), encode_tokens(tower, batch(OLD_TEXTS)))
    torch.testing.assert_close(smaller(batch(texts).ids), tower(batch(OLD_TEXTS).ids))
    assert torch.equal(smaller.token_embedding.weight, tower.token_embedding.weight[kept])
    assert smaller.vocab_size == smaller.token_embedding.num_embeddings == len(kept)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, END_OF_TEXT, VOCABULARY], r"the kept ids hold id 200; expected ids in \[0, 200\)"),
        ([-1, END_OF_TEXT], r"the kept ids hold id -1; expected ids in \[0, 200\)"),
        ([0, 1, 2], "the tower pools at id 199, the end of text; expected it to be kept"),
    ],
)
def test_pruning_refuses_unknown_ids_and_the_loss_of_the_end_of_text(kept, message):
    with pytest.raises(TokenizerError, match=message):
        shrink_token_embedding(text_tower(), kept)


# Training new rows alone


class TextModel(nn.Module):
    """A tower as a module that can be wrapped."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, tokens):
        return encode_tokens(self.tower, tokens)


def loss_of(model, step):
    texts = [[1, VOCABULARY + step, 5, END_OF_TEXT], [1, VOCABULARY + 7, END_OF_TEXT]]
    return (model(batch(texts)) * normal(2, 32, seed=step)).sum()


def train_new_rows_only(tower, wrap, *, fused, first_step=0):
    """Take three steps; return the embedding, having checked that only new rows changed."""
    tower.requires_grad_(False)
    embedding = tower.token_embedding.requires_grad_(True)
    model = wrap(TextModel(tower))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    before = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    for step in range(first_step, first_step + 3):
        loss_of(model, step).backward()
        with only_new_rows(embedding.weight, VOCABULARY):
            optimizer.step()
        optimizer.zero_grad()
    rows = before.pop("token_embedding.weight")
    for name, parameter in tower.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), name
    assert torch.equal(embedding.weight[:VOCABULARY], rows[:VOCABULARY])
    assert (embedding.weight[VOCABULARY:] != rows[VOCABULARY:]).any(dim=1).all()
    return embedding.weight.detach()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_new_rows_only_leaves_everything_else_bit_for_bit(fused):
    train_new_rows_only(grown(text_tower()), nn.Sequential, fused=fused)


def train_on_this_rank(rank):
    wrap = nn.parallel.DistributedDataParallel
    return train_new_rows_only(grown(text_tower()), wrap, fused=True, first_step=10 * rank)


@pytest.mark.distributed
def test_two_processes_train_the_same_new_rows_only():
    first, second = run_in_processes(train_on_this_rank, 2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("fused", [False, True])
def test_new_rows_take_the_steps_they_would_take_alone(fused):
    """Clipping inside the phase goes by the gradient of the new rows."""
    tower = grown(text_tower())
    model, weight = TextModel(tower), tower.token_embedding.weight
    alone = nn.Parameter(weight[VOCABULARY:].detach().clone())
    settings = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}
    optimizers = [torch.optim.AdamW(p, **settings) for p in (tower.parameters(), [alone])]
    for step in range(3):
        loss_of(model, step).backward()
        alone.grad = weight.grad[VOCABULARY:].clone()
        norm = nn.utils.clip_grad_norm_([alone], 1e-3)
        with only_new_rows(weight, VOCABULARY):
            clipped = nn.utils.clip_grad_norm_([weight], 1e-3)
            optimizers[0].step()
        optimizers[1].step()
        optimizers[0].zero_grad()
        torch.testing.assert_close(clipped, norm)
    torch.testing.assert_close(weight[VOCABULARY:], alone, rtol=1e-5, atol=1e-7)


def test_a_step_without_texts_changes_nothing_and_training_goes_on_afterwards():
    tower = grown(text_tower())
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.01, weight_decay=0.1)
    before = [parameter.clone() for parameter in tower.parameters()]
    with only_new_rows(tower.token_embedding.weight, VOCABULARY):
        optimizer.step()
    assert all(map(torch.equal, tower.parameters(), before))
    loss_of(TextModel(tower), 0).backward()
    optimizer.step()
    assert not any(map(torch.equal, tower.parameters(), before))
