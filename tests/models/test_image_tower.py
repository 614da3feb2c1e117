import copy

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.drop import DropPath

from vlm.errors import ConfigError
from vlm.models.blocks import recompute
from vlm.models.build import build_towers
from vlm.models.image_tower import (
    check_image_tower,
    features_of,
    hide_patches,
    image_blocks,
    image_groups,
    interpolate_positions,
    memory_format_of,
    patch_layout,
    set_patch_dropout,
    states_of,
)

SIZE = 64
TEXT = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
VIT = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 16, "image_size": SIZE}

TRANSFORMERS = {
    "class token": VIT,
    "norm after the mean": VIT
    | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "attentional pooling": VIT
    | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "oblong": VIT | {"image_size": (64, 32)},
}
TIMM = {
    name: {"timm_model_name": name, "image_size": SIZE, "timm_pool": pool, "timm_proj": projection}
    for name, pool, projection in (
        ("test_vit", "avg", "linear"),
        ("test_vit3", "map", "linear"),
        ("test_vit4", "avg", "mlp"),
        ("test_resnet", "avg", "linear"),
        ("test_convnext", "", "linear"),
        ("test_mambaout", "", "linear"),
        ("test_byobnet", "avg", None),
        ("deit_tiny_distilled_patch16_224", "", "linear"),
    )
}
KINDS = (
    TRANSFORMERS
    | TIMM
    | {
        "test_resnet flat": TIMM["test_resnet"] | {"timm_pool": "flatten"},
        "test_resnet fine": TIMM["test_resnet"] | {"timm_output_stride": 16},
        "resnet": {"layers": (1, 1, 1, 1), "width": 16, "image_size": SIZE},
        "rotary": {
            "timm_model_name": "eva02_tiny_patch14_224",
            "image_size": 56,
            "timm_pool": "token",
            "timm_proj": None,
        },
    }
)

kinds = pytest.mark.parametrize("vision_cfg", KINDS.values(), ids=KINDS.keys())


def image_tower(vision_cfg):
    torch.manual_seed(0)
    visual, _ = build_towers({"embed_dim": 32, "vision_cfg": vision_cfg, "text_cfg": TEXT})
    with torch.no_grad():  # what starts at zero would hide what comes before it
        for parameter in visual.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return visual.double()


def sides_of(vision_cfg):
    size = vision_cfg["image_size"]
    return (size, size) if isinstance(size, int) else size


def make_images(vision_cfg, count=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, *sides_of(vision_cfg), generator=generator, dtype=torch.float64)


def last_maps(visual, images):
    """The last states by the model's own way to give intermediate ones, as channels first."""
    options = {"indices": 1, "output_fmt": "NCHW"}
    if isinstance(visual, TimmModel):
        return visual.trunk.forward_intermediates(images, norm=True, **options)[1][-1]
    if not isinstance(visual, VisionTransformer):
        return visual.forward_intermediates(images, **options)["image_intermediates"][-1]
    maps = visual.forward_intermediates(images, **options)["image_intermediates"][-1]
    norm = visual.ln_post if visual.attn_pool is None else visual.attn_pool.ln_k
    return norm(maps.movedim(1, -1)).movedim(-1, 1)


@kinds
def test_one_pass_gives_the_towers_features_and_gradients_and_its_last_states(vision_cfg):
    visual, images = image_tower(vision_cfg).eval(), make_images(vision_cfg)
    features, states = states_of(visual, images)
    expected = visual(images)
    parameters = [each for each in visual.parameters() if each.requires_grad]
    *found, wanted = (
        torch.autograd.grad(each.square().sum(), parameters, materialize_grads=True)
        for each in (features, features_of(visual, images), expected)
    )
    for each, gradients in zip((features, features_of(visual, images)), found, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-12)
        for gradient, reference in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-9)
    layout = patch_layout(visual)
    maps = last_maps(visual, images)
    assert (tuple(maps.shape[2:]), maps.shape[1]) == layout
    torch.testing.assert_close(states, maps.flatten(2).transpose(1, 2), rtol=1e-8, atol=1e-10)


@kinds
def test_asking_for_the_layout_changes_neither_modes_nor_statistics(vision_cfg):
    visual = image_tower(vision_cfg).train()
    next(iter(visual.children())).eval()
    modes = [module.training for module in visual.modules()]
    before = copy.deepcopy(visual.state_dict())
    patch_layout(visual)
    assert modes == [module.training for module in visual.modules()]
    for name, tensor in visual.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("grid", "size"), [((2, 3), (8, 9)), ((4, 4), (16, 16)), ((3, 3), (10, 11)), ((2, 2), (3, 2))]
)
def test_hidden_patches_become_the_mean_colour_cell_by_cell(grid, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *size, generator=generator)
    hidden = torch.rand(3, grid[0] * grid[1], generator=generator) < 0.5
    expected = images.clone()
    height, width = size[0] // grid[0], size[1] // grid[1]
    for image in range(3):
        for y in range(size[0]):
            for x in range(size[1]):
                cell = min(y // height, grid[0] - 1) * grid[1] + min(x // width, grid[1] - 1)
                if hidden[image, cell]:
                    expected[image, :, y, x] = 0
    assert torch.equal(hide_patches(images, hidden, grid), expected)


@pytest.mark.parametrize("vision_cfg", TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def test_cells_are_the_patches_of_the_tower(vision_cfg):
    """A patch that is hidden changes its own embedding, and no other."""
    visual, images = image_tower(vision_cfg).eval(), make_images(vision_cfg, 1)
    rows, columns = patch_layout(visual).grid
    for patch in (0, columns + 1, rows * columns - 1):
        hidden = torch.zeros(1, rows * columns, dtype=torch.bool)
        hidden[0, patch] = True
        blank = hide_patches(images, hidden, (rows, columns))
        changed = (visual._embeds(blank) != visual._embeds(images)).any(dim=2)[0, 1:]
        assert changed.nonzero().flatten().tolist() == [patch]


DROPPING = {name: KINDS[name] for name in (*TRANSFORMERS, "test_vit", "test_vit4", "rotary")}


@pytest.mark.parametrize("vision_cfg", DROPPING.values(), ids=DROPPING.keys())
def test_patch_dropout_leaves_out_its_share_in_training_and_nothing_from_states(vision_cfg):
    visual, images = image_tower(vision_cfg), make_images(vision_cfg)
    rows, columns = patch_layout(visual).grid
    plain = visual.eval()(images)
    plain_states = states_of(visual, images)[1]
    lengths = []
    block = getattr(visual, "trunk", None)
    block = visual.transformer.resblocks[-1] if block is None else block.blocks[-1]
    block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    visual(images)
    prefix = lengths.pop() - rows * columns
    set_patch_dropout(visual, 0.75)
    dropped = visual.train()(images)
    assert lengths == [prefix + rows * columns // 4]
    assert not torch.isclose(dropped, plain).all()
    torch.testing.assert_close(states_of(visual, images)[0], plain)
    torch.testing.assert_close(states_of(visual, images)[1], plain_states)
    torch.testing.assert_close(visual.eval()(images), plain)
    visual.train()(images)
    assert lengths[-1] == lengths[0]  # states have not switched it off
    set_patch_dropout(visual, 0.0)
    torch.testing.assert_close(visual.train()(images), plain)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "resnet"])
def test_towers_without_patches_to_leave_out_refuse_to(name):
    visual = image_tower(KINDS[name])
    with pytest.raises(ConfigError, match="has no patches to drop"):
        set_patch_dropout(visual, 0.5)
    set_patch_dropout(visual, 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_patches_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=r"expected it in \[0, 1\)"):
        set_patch_dropout(image_tower(VIT), share)


@kinds
def test_every_weight_is_in_one_group_between_the_images_and_the_features(vision_cfg):
    visual = image_tower(vision_cfg)
    groups = image_groups(visual)
    inside = [id(parameter) for group in groups for parameter in group]
    assert sorted(inside) == sorted(id(parameter) for parameter in visual.parameters())
    names = {id(parameter): name for name, parameter in visual.named_parameters()}
    first, *_, last = [[names[id(parameter)] for parameter in group] for group in groups]
    assert any(word in name for name in first for word in ("conv", "patch_embed", "stem"))
    assert any(word in name for name in last for word in ("proj", "head", "mlp"))
    assert len(groups) >= 4


@pytest.mark.parametrize("vision_cfg", TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def test_the_last_groups_are_those_that_open_clip_unlocks(vision_cfg):
    visual = image_tower(vision_cfg)
    groups = image_groups(visual)
    pooling = set()
    if visual.attn_pool is not None:  # which open_clip never unlocks
        pooling = {id(parameter) for parameter in visual.attn_pool.parameters()}
    for unlocked in range(len(groups) + 1):
        visual.lock(unlocked_groups=unlocked)
        trained = {id(parameter) for parameter in visual.parameters() if parameter.requires_grad}
        expected = groups[len(groups) - unlocked :]
        assert trained == {id(each) for group in expected for each in group} - pooling


@kinds
def test_blocks_hold_most_weights_and_may_be_computed_again(vision_cfg):
    visual, images = image_tower(vision_cfg).eval(), make_images(vision_cfg)
    blocks = image_blocks(visual)
    held = {id(each) for block in blocks for each in block.parameters()}
    assert len(held) > len(list(visual.parameters())) / 2
    assert len(held) == sum(len(list(block.parameters())) for block in blocks)  # not nested
    parameters = [each for each in visual.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(visual(images).square().sum(), parameters)
    recompute(blocks)
    found = torch.autograd.grad(visual(images).square().sum(), parameters)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("changes", [{"attentional_pool": "parallel"}, {"pool_type": "none"}])
def test_a_tower_that_gives_more_than_one_vector_an_image_is_refused(changes):
    vision_cfg = VIT | {"width": 32, "attn_pooler_heads": 2} | changes
    visual = open_clip.CustomTextCLIP(32, vision_cfg, TEXT).visual
    with pytest.raises(ConfigError, match="pools to more than one vector an image"):
        check_image_tower(visual)


def test_a_model_of_timm_without_states_of_patches_is_named():
    visual = image_tower({"timm_model_name": "test_resnet", "image_size": SIZE})
    visual.trunk.forward_features = lambda images: [images]
    with pytest.raises(ConfigError, match="timm's ResNet gives no states of patches"):
        patch_layout(visual)


def test_channels_are_innermost_except_where_training_on_a_cpu_would_break():
    assert memory_format_of(image_tower(KINDS["test_resnet"])) == torch.channels_last
    fastvit = image_tower({"timm_model_name": "fastvit_t8", "image_size": SIZE})
    assert memory_format_of(fastvit) == torch.contiguous_format


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "test_vit4"])
def test_a_vision_transformer_of_timm_reads_other_sizes_as_one_built_for_them(name):
    visual, images = image_tower(KINDS[name]).eval(), make_images(KINDS[name])
    own = visual(images)
    interpolate_positions(visual)
    torch.testing.assert_close(visual(images), own, rtol=0, atol=1e-12)
    theirs = timm.create_model(name, img_size=SIZE, dynamic_img_size=True, num_classes=0)
    theirs.load_state_dict(visual.trunk.state_dict(), strict=False)  # but for what pools
    other = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = theirs.double().eval().forward_features(other)
    found = visual.trunk.forward_features(other)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_flattening_projects_every_place_of_the_last_map():
    visual = image_tower(KINDS["test_resnet flat"]).eval()
    images = make_images(KINDS["test_resnet flat"])
    maps = visual.trunk.forward_features(images)
    assert maps.shape[-2:] == (2, 2)
    expected = torch.einsum(
        "bchw,echw->be", maps, visual.head.proj.weight.view(32, *maps.shape[1:])
    )
    torch.testing.assert_close(visual(images), expected)
    mirrored = visual(images.flip(-1))
    assert not torch.allclose(mirrored, visual(images))


@pytest.mark.parametrize(
    "changes", [{"timm_model_name": "test_vit"}, {"timm_proj": "mlp"}], ids=["vit", "mlp"]
)
def test_a_tower_without_a_map_to_flatten_is_refused(changes):
    with pytest.raises(ConfigError, match=r"timm_pool is flatten, and .* expected a convolutional"):
        image_tower(KINDS["test_resnet flat"] | changes)


def test_a_finer_map_has_the_weights_of_timms_own_model_of_that_stride():
    changes = {"timm_pool": "flatten", "timm_output_stride": 8}
    visual = image_tower(KINDS["test_resnet"] | changes).eval()
    theirs = timm.create_model("test_resnet", output_stride=8, num_classes=0).double().eval()
    theirs.load_state_dict(visual.trunk.state_dict())
    images = make_images(KINDS["test_resnet"])
    maps = theirs.forward_features(images)
    assert maps.shape[-2:] == (SIZE // 8, SIZE // 8)
    torch.testing.assert_close(visual(images), visual.head(maps), rtol=0, atol=0)


@pytest.mark.parametrize("pool", ["", "avg"])
def test_a_finer_map_is_pooled_as_the_models_own_is(pool):
    changes = {"timm_pool": pool, "timm_output_stride": 32}  # its own stride: the same model
    visual = image_tower(KINDS["test_resnet"] | changes).eval()
    plain = image_tower(KINDS["test_resnet"] | {"timm_pool": pool}).eval()
    plain.load_state_dict(visual.state_dict())
    images = make_images(KINDS["test_resnet"])
    torch.testing.assert_close(visual(images), plain(images), rtol=0, atol=0)


def test_a_finer_map_keeps_the_ratio_of_dropped_paths():
    changes = {"timm_output_stride": 16, "timm_drop_path": 0.5}
    visual = image_tower(KINDS["test_resnet"] | changes)
    ratios = {m.drop_prob for m in visual.modules() if isinstance(m, DropPath)}
    assert max(ratios) == 0.5


@pytest.mark.parametrize(("name", "stride"), [("test_vit", 16), ("test_resnet", 5)])
def test_a_stride_that_the_model_does_not_take_is_refused(name, stride):
    with pytest.raises(ConfigError, match=rf"timm_output_stride is {stride}, which {name} does"):
        image_tower(KINDS[name] | {"timm_output_stride": stride})
