"""Any index that FAISS builds finds what brute force finds, or is refused in one sentence."""

import faiss
import numpy as np
import pytest

from vlm.errors import SearchIndexError
from vlm.search.index import Tunable, VectorIndex, check_factory


def unit_vectors(count, dim=32, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def share_found(hits, vectors, queries, k):
    nearest = np.argsort(-(queries.astype(np.float64) @ vectors.T), axis=1)[:, :k]
    pairs = zip(hits.ids[:, :k], nearest, strict=True)
    return np.mean([len(set(found) & set(right)) / k for found, right in pairs])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("Flat", 1), ("HNSW16@efSearch=400", 1), ("IVF8,Flat@nprobe=8", 1),
        ("IVF8,SQ8@nprobe=8", 0.95), ("SQ8", 0.95), ("IVF8,PQ8x4,RFlat@nprobe=8,k_factor_rf=70", 1),
        ("SQ4,RFlat@k_factor_rf=20", 1),
    ],
)  # fmt: skip
def test_an_index_at_full_effort_finds_what_brute_force_finds(factory, least):
    vectors, queries = unit_vectors(700), unit_vectors(40, seed=1)
    index = VectorIndex.build(vectors, factory)
    assert len(index) == 700
    assert share_found(index.search(queries, 10), vectors, queries, 10) >= least


def test_flat_is_exact_down_to_the_scores():
    vectors, queries = unit_vectors(300), unit_vectors(20, seed=1)
    hits = VectorIndex.build(vectors, "Flat").search(queries, 20)
    cosines = queries.astype(np.float64) @ vectors.T
    assert hits.ids.tolist() == np.argsort(-cosines, axis=1)[:, :20].tolist()
    np.testing.assert_allclose(hits.scores, -np.sort(-cosines, axis=1)[:, :20], atol=1e-6)


def test_more_effort_finds_more():
    vectors, queries = unit_vectors(700), unit_vectors(40, seed=1)
    index = VectorIndex.build(vectors, "IVF16,Flat")
    assert (index.tunable, index.parameters) == (Tunable("nprobe", 16), {})
    shares = []
    for nprobe in (1, 4, 16):
        index.set_parameter("nprobe", nprobe)
        shares.append(share_found(index.search(queries, 10), vectors, queries, 10))
    assert shares[0] < shares[1] < shares[2] == 1
    assert index.parameters == {"nprobe": 16}


@pytest.mark.parametrize(
    ("factory", "tunable"),
    [
        ("Flat", None), ("SQ8", None), ("HNSW16", Tunable("efSearch", 512)),
        ("PCA16,IVF4,Flat", Tunable("nprobe", 4)), ("IVF4_HNSW8,SQ8,RFlat", Tunable("nprobe", 4)),
        ("SQ4,RFlat", Tunable("k_factor_rf", 64)), ("HNSW16@efSearch=9", None),
        ("IVF4,SQ4,RFlat@k_factor_rf=4", Tunable("nprobe", 4)),
        ("IVF4,SQ4,RFlat@nprobe=4", Tunable("k_factor_rf", 64)),
    ],
)  # fmt: skip
def test_what_decides_between_time_and_recall_is_known(factory, tunable):
    assert VectorIndex.build(unit_vectors(200), factory).tunable == tunable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "least", "most"),
    [
        ("Flat", 128, 129), ("SQ8", 32, 34), ("SQfp16", 64, 66), ("IVF4,Flat", 136, 139),
        ("IVF4,SQ8", 40, 43), ("HNSW32", 128 + 256, 128 + 256 + 24), ("PQ8x4", 4, 7),
    ],
)  # fmt: skip
def test_bytes_a_vector_are_those_of_its_code_its_links_and_its_id(factory, least, most):
    index = VectorIndex.build(unit_vectors(1000), factory)
    assert least <= index.bytes_per_vector <= most
    assert 0 < index.build_seconds < 30


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("HSNW32", "FAISS cannot make the index 'HSNW32' .*of width 32: could not parse index"),
        ("", "FAISS cannot make the index ''"),
        ("IVF0,Flat", "FAISS cannot make the index 'IVF0,Flat' .* a size is 0"),
        ("IVF0,SQ8", "FAISS cannot make the index 'IVF0,SQ8' .* a size is 0"),
        ("PQ7", "of width 32: The dimension of the vector .* should be a multiple"),
        ("IMI2x3,Flat", "MultiIndex not implemented for inner prod"),
        ("IVF200,Flat", r"IVF200,Flat cannot be built from 50 vectors: .*\(50\) should be at"),
        ("PQ4", r"PQ4 cannot be built from 50 vectors: .* number of clusters \(256\)"),
        ("IDMap,Flat", "cannot be built from 50 vectors: add does not make sense with IndexIDMap"),
        ("Flat@nprobe", "'nprobe' is no search parameter; expected NAME=NUMBER"),
        ("Flat@nprobe=-1", "'nprobe=-1' is no search parameter"),
        ("Flat@nprobe=4", "the index Flat has no search parameter nprobe"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_in_one_sentence(factory, said):
    with pytest.raises(SearchIndexError, match=said) as caught:
        VectorIndex.build(unit_vectors(50), factory)
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_vectors_that_are_no_numbers_or_not_there_are_refused():
    vectors = unit_vectors(5)
    vectors[2, 1] = np.nan
    with pytest.raises(SearchIndexError, match="cannot index 5 vectors, 1 of them not finite"):
        VectorIndex.build(vectors, "Flat")
    with pytest.raises(SearchIndexError, match="cannot index 0 vectors"):
        VectorIndex.build(vectors[:0], "Flat")


def test_more_vectors_than_training_needs_are_sampled_by_the_seed(monkeypatch):
    monkeypatch.setattr("vlm.search.index._TRAINING_POINTS", 1)
    vectors, queries = unit_vectors(2000), unit_vectors(40, seed=1)
    found = [
        VectorIndex.build(vectors, "SQ4", seed=seed).search(queries, 5).scores.tolist()
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


def test_an_index_moves_to_a_gpu_where_one_has_its_kind(monkeypatch):
    asked = []

    def move(resources, number, index):
        asked.append(type(faiss.downcast_index(index)).__name__)
        if "HNSW" in asked[-1]:
            raise RuntimeError("This index type is not implemented on GPU.")
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", move, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", faiss.ParameterSpace, raising=False)
    vectors = unit_vectors(200)
    assert VectorIndex.build(vectors, "IVF4,Flat@nprobe=2", device=None).on_gpu
    assert not VectorIndex.build(vectors, "HNSW16@efSearch=20", device=None).on_gpu
    assert asked == ["IndexIVFFlat", "IndexHNSWFlat"]
    assert not VectorIndex.build(vectors, "IVF4,Flat").on_gpu
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("HSNW32", "FAISS cannot make the index 'HSNW32'"),
        ("PQ7", "PQ7"),
        ("HNSW32@foo=3", "has no search parameter foo"),
        ("IVF16,Flat@nprobe=many", "is no search parameter"),
    ],
)
def test_a_factory_is_refused_before_anything_is_built(factory, said):
    with pytest.raises(SearchIndexError, match=said):
        check_factory(factory, 32)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32@efSearch=40", "IVF16,PQ8np@nprobe=4"])
def test_a_factory_that_can_be_built_is_accepted(factory):
    check_factory(factory, 32)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW8", "SQ4,RFlat"])
def test_a_parameter_that_was_set_is_in_the_file(factory, tmp_path):
    vectors, queries = unit_vectors(700), unit_vectors(40, seed=1)
    index = VectorIndex.build(vectors, factory)
    index.set_parameter(index.tunable.name, 13)
    index.write(tmp_path / "index")
    found = VectorIndex.read(tmp_path / "index").search(queries, 10)
    assert found.ids.tolist() == index.search(queries, 10).ids.tolist()


class Counted(VectorIndex):
    """Remembers what its parameter was set to."""

    def set_parameter(self, name, value):
        self.parameters[name] = value


def counted(high):
    index = Counted(faiss.IndexFlatIP(4))
    index.tunable = Tunable("effort", high)
    return index


@pytest.mark.parametrize("high", [1, 2, 37, 512])
@pytest.mark.parametrize("target", [0.01, 0.5, 1.0])
def test_tuning_finds_the_smallest_value_that_suffices(high, target):
    index, asked = counted(high), []

    def recall():
        asked.append(index.parameters["effort"])
        return asked[-1] / high

    assert index.tune(recall, target=target)
    assert index.parameters["effort"] == next(n for n in range(1, high + 1) if n / high >= target)
    assert len(asked) == len(set(asked)) <= 2 + high.bit_length()


def test_a_target_out_of_reach_gets_the_smallest_value_that_does_as_well_as_the_highest():
    index = counted(512)
    assert not index.tune(lambda: min(index.parameters["effort"], 20) / 40, target=0.9)
    assert index.parameters["effort"] == 20
