"""Optimizers against their formulas, and the rate and decay of every parameter by hand."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.builders import tiny_model, tiny_tokenizer
from tests.support.processes import run_in_world
from tests.support.tiny_run import config
from vlm.errors import ConfigError
from vlm.models.build import build_from_config
from vlm.models.config import ModelConfig, MultiwayConfig
from vlm.models.pretraining import PretrainingModel
from vlm.training.build import build_run
from vlm.training.config import EvaluationConfig, OptimizerConfig
from vlm.training.optimization.averaging import MovingAverage
from vlm.training.optimization.config import TowerRateConfig
from vlm.training.optimization.optimizer import RATE_RATIO, build_optimizer, reads_found_inf
from vlm.training.saving.state import OptimizerState


@pytest.fixture(scope="module")
def model():
    return PretrainingModel(tiny_model(tiny_tokenizer()))


def by_name(model, optimizer, key):
    """A setting of every parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group[key]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_only_matrices_and_kernels_decay(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    assert by_name(model, optimizer, "weight_decay") == {
        name: 0.3 if parameter.ndim >= 2 else 0.0 for name, parameter in model.named_parameters()
    }
    assert set(by_name(model, optimizer, RATE_RATIO).values()) == {1.0}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert by_name(model, optimizer, RATE_RATIO).keys() == {"1.weight", "1.bias"}


def test_a_tower_has_its_own_rate_and_decay_and_the_rest_the_models(model):
    config = OptimizerConfig(
        weight_decay=0.3, image=TowerRateConfig(learning_rate_ratio=0.1, weight_decay=0.0)
    )
    optimizer = build_optimizer(model, config)
    rates = by_name(model, optimizer, RATE_RATIO)
    decays = by_name(model, optimizer, "weight_decay")
    for name, parameter in model.named_parameters():
        in_tower = name.startswith("encoder.visual.")
        assert rates[name] == (0.1 if in_tower else 1.0), name
        assert decays[name] == (0.0 if in_tower or parameter.ndim < 2 else 0.3), name


def test_layer_decay_lowers_the_rate_stage_by_stage_towards_the_input(model):
    config = OptimizerConfig(text=TowerRateConfig(learning_rate_ratio=0.5, layer_decay=0.75))
    rates = by_name(model, build_optimizer(model, config), RATE_RATIO)
    # By hand: the projection, the one block with the last norm, the embeddings.
    stages = {
        0.5: ("text_projection",),
        0.5 * 0.75: ("transformer.", "ln_final."),
        0.5 * 0.75**2: ("token_embedding.", "positional_embedding"),
    }
    expected = {
        name: next(
            (
                ratio
                for ratio, starts in stages.items()
                if name.startswith(tuple(f"encoder.text.{start}" for start in starts))
            ),
            1.0,
        )
        for name, _ in model.named_parameters()
    }
    assert rates == expected
    assert len(set(expected.values())) == 4


def test_what_both_towers_share_gets_the_lower_rate_and_decay():
    multiway = MultiwayConfig(image_size=12, patch_size=4, width=8, heads=2, layers=2, vl_layers=2)
    encoder = build_from_config(ModelConfig(multiway=multiway), tiny_tokenizer())
    model = PretrainingModel(encoder)
    config = OptimizerConfig(
        image=TowerRateConfig(learning_rate_ratio=0.1, weight_decay=0.2),
        text=TowerRateConfig(learning_rate_ratio=0.5, weight_decay=0.0),
    )
    optimizer = build_optimizer(model, config)
    rates = by_name(model, optimizer, RATE_RATIO)
    decays = by_name(model, optimizer, "weight_decay")
    images, texts = (
        {each for group in groups for each in group}
        for groups in (encoder.image_groups(), encoder.text_groups())
    )
    assert images & texts
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the mask token
            continue
        sides = [parameter in images, parameter in texts]
        ratio, decay = {(True, False): (0.1, 0.2), (False, True): (0.5, 0.0)}.get(
            tuple(sides), (0.1, 0.0) if all(sides) else (1.0, 0.1)
        )
        assert rates[name] == ratio, name
        assert decays[name] == (decay if parameter.ndim >= 2 else 0.0), name


def test_a_step_is_the_step_of_adamw():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weight, bias = (p.detach().clone() for p in model.parameters())
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-8)
    optimizer = build_optimizer(model, config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # After one step Adam's moments cancel: every gradient moves its weight by the rate.
    torch.testing.assert_close(model.weight, weight * (1 - 0.01 * 0.5) - 0.01)
    torch.testing.assert_close(model.bias, bias - 0.01)


def steps_of(config, gradients):
    """The weights of one matrix after optimizer steps with the gradients given."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    start = model.weight.detach().clone()
    optimizer = build_optimizer(model, config)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return start, model.weight.detach()


def test_steps_are_the_steps_of_lion():
    torch.manual_seed(1)
    gradients = [torch.randn(3, 5) for _ in range(4)]
    config = OptimizerConfig(name="lion", learning_rate=0.01, weight_decay=0.5, betas=(0.9, 0.98))
    weight, found = steps_of(config, gradients)
    moment = torch.zeros(3, 5)
    for gradient in gradients:  # Chen et al. 2023, algorithm 2
        update = torch.sign(0.9 * moment + 0.1 * gradient)
        weight = weight - 0.01 * (update + 0.5 * weight)
        moment = 0.98 * moment + 0.02 * gradient
    torch.testing.assert_close(found, weight)


class Towers(nn.Module):
    """As much of a model as the choice of matrices asks for."""

    def __init__(self, **members):
        super().__init__()
        self.encoder = nn.ModuleDict(members)
        block = self.encoder["block"]
        self.encoder.image_groups = lambda: [[], list(block.parameters()), []]
        self.encoder.text_groups = lambda: [[], []]


def orthogonalized(matrix):
    """Five steps of Newton and Schulz by the polynomial of Jordan et al. 2024, in float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


@pytest.mark.parametrize("shape", [(12, 8), (8, 24)])
def test_steps_are_the_steps_of_muon_on_matrices_of_blocks_and_of_adamw_elsewhere(shape):
    torch.manual_seed(0)
    model = Towers(block=nn.Linear(shape[1], shape[0]), head=nn.Linear(3, 2, bias=False))
    model.encoder["block"].weight.data.normal_()
    config = OptimizerConfig(name="muon", learning_rate=0.01, weight_decay=0.5)
    matrix, head = (model.encoder[name].weight.detach().clone() for name in ("block", "head"))
    optimizer = build_optimizer(model, config)
    moment = torch.zeros(shape)
    for _ in range(3):
        gradient = torch.randn(shape)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.encoder["block"].weight.grad = gradient.clone()
        optimizer.step()
        moment = 0.95 * moment + 0.05 * gradient
        update = orthogonalized(0.95 * moment + 0.05 * gradient)
        # As large as an update of AdamW (Liu et al. 2025, "Muon is scalable", section 2.2).
        matrix = matrix * (1 - 0.01 * 0.5) - 0.01 * 0.2 * max(shape) ** 0.5 * update
        head = head * (1 - 0.01 * 0.5) - 0.01
    found = model.encoder["block"].weight.double()
    # torch orthogonalises in bfloat16.
    torch.testing.assert_close(found, matrix.double(), rtol=0, atol=0.01 * 0.05)
    torch.testing.assert_close(model.encoder["head"].weight, head)
    assert {tuple(slots) for slots in optimizer.state.values()} == {
        ("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"),
    }  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters_of_a_convolution_are_rows_of_a_matrix_to_muon(memory_format):
    torch.manual_seed(0)
    model = Towers(block=nn.Conv2d(4, 6, 2, bias=False), head=nn.Linear(2, 1))
    model.to(memory_format=memory_format)
    filters = model.encoder["block"].weight
    matrix, moment = filters.detach().reshape(6, 16).clone(), torch.zeros(6, 16)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", learning_rate=0.01))
    decay = 1 - 0.01 * OptimizerConfig().weight_decay
    for _ in range(3):
        filters.grad = torch.randn(6, 4, 2, 2).to(memory_format=memory_format)
        gradient = filters.grad.reshape(6, 16).clone()
        optimizer.step()
        moment = 0.95 * moment + 0.05 * gradient
        update = orthogonalized(0.95 * moment + 0.05 * gradient)
        matrix = matrix * decay - 0.01 * 0.2 * 16**0.5 * update
    assert filters.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(
        filters.reshape(6, 16).double(), matrix.double(), rtol=0, atol=0.01 * 0.05
    )
    (state,) = (optimizer.state[p] for p in (filters,))
    torch.testing.assert_close(state["momentum_buffer"].reshape(6, 16), moment)


def test_matrices_and_filters_are_muons_but_for_tables_and_what_reads_pixels():
    model = PretrainingModel(tiny_model(tiny_tokenizer()))
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[p] for g in part.param_groups for p in g["params"]}
                   for part in optimizer.parts)  # fmt: skip
    assert muon | adamw == set(names.values())
    assert not muon & adamw
    wide = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert wide - muon == {
        "encoder.visual.trunk.conv1.0.weight", "encoder.text.token_embedding.weight",
        "encoder.text.positional_embedding",
    }  # fmt: skip
    assert muon < wide


def test_positions_and_queries_of_an_attention_pool_are_not_muons():
    config = ModelConfig(open_clip="RN50")
    with torch.device("meta"):
        model = PretrainingModel(build_from_config(config, tiny_tokenizer()))
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    muon = {id(p) for group in optimizer.parts[0].param_groups for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert "encoder.visual.attnpool.positional_embedding" not in names
    assert "encoder.visual.attnpool.q_proj.weight" in names


def test_muon_without_matrices_is_refused():
    model = Towers(block=nn.Conv2d(4, 4, 3, groups=4))  # each filter sees one channel
    with pytest.raises(ConfigError, match="the towers have no matrix that is trained"):
        build_optimizer(model, OptimizerConfig(name="muon"))


def test_optimizers_together_go_on_from_their_state_bit_for_bit():
    def build():
        torch.manual_seed(0)
        model = Towers(block=nn.Linear(8, 6), head=nn.Linear(6, 2))
        return model, build_optimizer(model, OptimizerConfig(name="muon"))

    def train(model, optimizer, steps):
        for step in steps:
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            outputs = model.encoder["head"](model.encoder["block"](inputs))
            outputs.square().mean().backward()
            optimizer.step()
        return outputs.square().mean()

    model, optimizer = build()
    first = train(model, optimizer, [0])
    train(model, optimizer, range(1, 3))
    kept = OptimizerState(model, optimizer).state_dict()
    kept = {name: each.clone() for name, each in kept.items()}
    resumed, resumed_optimizer = build()
    resumed.load_state_dict(model.state_dict())
    OptimizerState(resumed, resumed_optimizer).load_state_dict(kept)
    for group in resumed_optimizer.param_groups:
        group["lr"] = 0.002  # of the groups that its parts have as well
    for group in optimizer.param_groups:
        group["lr"] = 0.002
    assert train(model, optimizer, range(3, 6)) < first
    train(resumed, resumed_optimizer, range(3, 6))
    for name, each in model.state_dict().items():
        assert torch.equal(each, resumed.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_going_on_from_a_checkpoint_leaves_the_same_weights(inputs, tmp_path, name, dtype):
    towers = TowerRateConfig(learning_rate_ratio=0.5, weight_decay=0.0, layer_decay=0.8)
    settings = config(
        inputs,
        tmp_path,
        optimizer=OptimizerConfig(name=name, state_dtype=dtype, image=towers, text=towers),
        evaluation=EvaluationConfig(),
    )
    build_run(settings).fit()
    whole = (tmp_path / "bundle" / "open_clip_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000007")
    run = build_run(settings, resume="auto")
    assert run.progress.step == 5
    assert (run.fit() / "open_clip_model.safetensors").read_bytes() == whole


def sharded_steps(rank, name, dtype):
    """Weights and averages after steps on a model that is whole, and on one in two shards."""
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        model = Towers(block=nn.Linear(6, 7), head=nn.Linear(7, 2))
        if shards:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        settings = OptimizerConfig(name=name, state_dtype=dtype, learning_rate=0.01)
        optimizer = build_optimizer(model, settings)
        average = MovingAverage(model, 0.9)
        for step in range(1, 4):
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape)
                parameter.grad = (
                    distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                    if shards
                    else gradient
                )
            optimizer.step()
            average.update(step)
        parameters = dict(model.named_parameters())
        with average.in_place():
            averages = {name: full(each) for name, each in parameters.items()}
        found.append([{name: full(each) for name, each in parameters.items()}, averages])
    return found


def full(parameter):
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_shards_take_the_steps_of_the_whole_and_so_does_their_average(name, dtype):
    # Muon adds up in bfloat16, in another order; its three updates are of 5e-3 each.
    tolerance = 1e-3 if name == "muon" else 0
    for whole, shards in run_in_world(sharded_steps, 2, name, dtype):
        for expected, found in zip(whole, shards, strict=True):
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "on_device"), [("adamw", True), ("lion", False), ("muon", False)])
def test_only_a_fused_step_looks_by_itself_whether_a_gradient_is_finite(name, on_device):
    model = Towers(block=nn.Linear(3, 2))
    assert reads_found_inf(build_optimizer(model, OptimizerConfig(name=name))) is on_device


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected two in"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number of at least 0"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm is 0.0; expected more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(OptimizerConfig(), **changes)


def test_a_towers_settings_out_of_range_are_refused():
    with pytest.raises(
        ConfigError, match=r"layer_decay 0\.0; expected at least 0, and more than 0"
    ):
        TowerRateConfig(layer_decay=0.0)
    with pytest.raises(
        ConfigError, match=r"weight_decay is -0\.1; expected a number of at least 0"
    ):
        TowerRateConfig(weight_decay=-0.1)
