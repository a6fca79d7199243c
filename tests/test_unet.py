"""The U-Net: each field of its configuration does what it says."""

from unittest import mock

import pytest
import torch

from ddpm_fast.unet import Attention, Downsample, ResBlock, Stage, UNet, check_inputs
from ddpm_fast.unet_config import UNetConfig


def inputs(config: UNetConfig, n: int = 2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *config.sample_shape, generator=generator), torch.tensor([3, 70])[:n]


def count(unet: UNet, kind: type) -> int:
    return sum(isinstance(module, kind) for module in unet.modules())


def test_the_defaults_are_the_published_cifar10_model():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307


def test_a_new_network_predicts_zero(tiny_config):
    unet = UNet(tiny_config())
    assert not unet(*inputs(unet.config)).any()


@pytest.mark.parametrize(
    "change",
    [
        {"embedding_order": "cos_sin"},
        {"embedding_order": "interleaved"},
        {"embedding_shift": 0.0},
        {"norm_eps": 1e-2},
        {"norm_groups": 2},
        {"downsample_padding": "symmetric"},
        {"num_heads": 2},
        {"num_heads": 2, "qkv_order": "heads"},
        {"timestep_scale": 0.25},
    ],
)
def test_a_convention_changes_the_result_and_not_the_weights(change, tiny_unet, tiny_config):
    before = tiny_unet()
    after = UNet(tiny_config(**change)).eval()
    after.load_state_dict(before.state_dict())
    x = inputs(before.config)
    assert (before(*x) - after(*x)).abs().max() > 1e-4


def test_head_channels_is_another_way_to_give_the_heads(tiny_unet):
    by_number, by_width = tiny_unet(num_heads=4), tiny_unet(head_channels=4)
    x = inputs(by_number.config)
    assert torch.equal(by_number(*x), by_width(*x))


@pytest.mark.parametrize(
    "levels,middle,want",
    [
        ((False, False), False, 0),
        ((False, False), True, 1),
        ((True, False), False, 3),  # one on the way down, two up
        ((True, True), True, 7),
    ],
)
def test_attention_is_where_it_is_asked_for(levels, middle, want, tiny_config):
    unet = UNet(tiny_config(attention_levels=levels, mid_attention=middle))
    assert count(unet, Attention) == want
    assert (unet.middle[0].attention is not None) == middle


def test_attention_on_the_way_up_may_follow_the_last_block_only(tiny_config):
    unet = UNet(tiny_config(num_res_blocks=2, attention_levels=(True, True), up_attention="last"))
    stages = [m for m in unet.up if isinstance(m, Stage)]
    assert [s.attention is not None for s in stages] == 2 * [False, False, True]
    assert all(m.attention is not None for m in unet.down if isinstance(m, Stage))


def test_the_middle_s_attention_may_take_its_input_as_it_is(tiny_unet):
    layer = tiny_unet(mid_attention_norm=False).middle[0].attention
    other = tiny_unet().middle[0].attention
    assert isinstance(layer.norm, torch.nn.Identity) and not isinstance(
        other.norm, type(layer.norm)
    )
    other.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 16, 4, 4)
    h = layer(x) - x
    other.norm = torch.nn.Identity()
    torch.testing.assert_close(other(x) - x, h)


def test_scaled_timesteps_are_other_timesteps(tiny_unet):
    plain, scaled = tiny_unet(), tiny_unet(timestep_scale=0.25)
    x, t = inputs(plain.config)
    torch.testing.assert_close(scaled(x, 4 * t), plain(x, t), rtol=0, atol=0)
    torch.testing.assert_close(scaled(x, t), plain(x, t * 0.25), rtol=0, atol=0)
    scaled = tiny_unet(timestep_scale=1000 / 300)
    times = torch.arange(290, 300)
    x = x[:1].expand(10, -1, -1, -1)
    assert torch.equal(scaled(x, times.double()), scaled(x, times))  # float32, whatever came


def test_the_embedding_may_have_its_own_width(tiny_unet):
    unet = tiny_unet(embedding_channels=12)
    assert unet.time_mlp[0].weight.shape == (48, 12) and unet.time_mlp[2].weight.shape == (48, 48)
    assert unet.conv_in.weight.shape[0] == 8 and unet(*inputs(unet.config)).shape == (2, 1, 8, 8)


def test_levels_of_one_and_a_half_times_the_channels(tiny_unet):
    unet = tiny_unet(channel_mult=(0.5, 1.5))
    assert unet.config.level_channels == (4, 12) and unet.config.channel_mult == (0.5, 1.5)
    assert unet(*inputs(unet.config)).shape == (2, 1, 8, 8)


def test_residual_blocks_resample_instead_of_convolutions(tiny_config, tiny_unet):
    plain, adm = UNet(tiny_config()), tiny_unet(resblock_updown=True)
    assert count(plain, Downsample) == 1 and count(adm, Downsample) == 0
    assert [m.resample for m in adm.modules() if isinstance(m, ResBlock) and m.resample] == [
        "down",
        "up",
    ]
    assert adm(*inputs(adm.config)).shape == (2, 1, 8, 8)


def test_learned_sigma_doubles_the_channels(tiny_unet):
    unet = tiny_unet(learn_sigma=True, in_channels=3)
    assert unet(*inputs(unet.config)).shape == (2, 6, 8, 8)


def test_dropout_is_for_training_only(tiny_unet):
    unet = tiny_unet(dropout=0.5)
    x = inputs(unet.config)
    assert torch.equal(unet(*x), tiny_unet()(*x))
    assert not torch.equal(unet.train()(*x), unet(*x))


def test_the_row_is_the_null_class(tiny_unet):
    unet = tiny_unet(num_classes=3, null_class="row")
    x, t = inputs(unet.config)
    assert unet.class_embedding.weight.shape == (4, 32)
    null = unet(x, t)
    assert torch.equal(null, unet(x, t, torch.tensor([3, 3])))
    assert (null - unet(x, t, torch.tensor([0, 2]))).abs().amax((1, 2, 3)).min() > 1e-3
    unet.class_embedding.weight[3] += 1
    assert not torch.equal(null, unet(x, t))


def test_the_zero_null_class_is_the_network_without_classes(tiny_unet, tiny_config):
    unet = tiny_unet(num_classes=3, null_class="zero")
    plain = UNet(tiny_config()).eval()
    weights = unet.state_dict()
    assert weights.pop("class_embedding.weight").shape == (3, 32)
    plain.load_state_dict(weights)
    x, t = inputs(unet.config)
    torch.testing.assert_close(unet(x, t), plain(x, t))
    mixed = unet(x, t, torch.tensor([3, 1]))
    torch.testing.assert_close(mixed[:1], plain(x, t)[:1])
    torch.testing.assert_close(mixed[1:], unet(x, t, torch.tensor([1, 1]))[1:])
    assert (mixed[1] - plain(x, t)[1]).abs().max() > 1e-3


def test_without_a_null_class_a_label_is_needed(tiny_unet):
    unet = tiny_unet(num_classes=3)
    x, t = inputs(unet.config)
    assert unet.class_embedding.weight.shape == (3, 32)
    assert not torch.equal(unet(x, t, torch.tensor([0, 0])), unet(x, t, torch.tensor([2, 2])))
    with pytest.raises(ValueError, match="without a null class: give class_labels"):
        unet(x, t)
    with pytest.raises(ValueError, match=r"must be in 0\.\.2, got 0 to 3"):
        unet(x, t, torch.tensor([0, 3]))


@pytest.mark.parametrize("null", ["row", "zero"])
@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.zeros(2), torch.zeros(1).long()]
)
def test_labels_that_do_not_exist_are_refused(null, labels, tiny_unet):
    unet = tiny_unet(num_classes=3, null_class=null)
    with pytest.raises(ValueError, match="class_labels must be"):
        unet(*inputs(unet.config), labels)


def test_inputs_that_do_not_fit_are_refused(tiny_unet):
    unet = tiny_unet()
    x, t = inputs(unet.config)
    with pytest.raises(ValueError, match="trained without classes"):
        unet(x, t, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="1 channels, got 3"):
        unet(x.repeat(1, 3, 1, 1), t)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\)"):
        unet(x, t[:1])
    with pytest.raises(ValueError, match=r"at least one sample, got shape \(0, 1, 8, 8\)"):
        unet(x[:0], t[:0])
    with pytest.raises(ValueError, match="multiples of 2, got"):
        unet(x[..., :7], t)
    with pytest.raises(ValueError, match="2 spatial sizes"):
        unet(x[..., 0], t)


@pytest.mark.parametrize(
    "size,levels",
    [((28, 28), 2), ((28, 28), 3), ((8, 20), 3), ((16,), 3), ((6,), 2)],
)
@pytest.mark.parametrize("updown", [False, True])
def test_sizes_that_can_be_halved_work(size, levels, updown, tiny_unet):
    unet = tiny_unet(
        sample_size=size,
        channel_mult=(1,) * levels,
        attention_levels=(False,) * (levels - 1) + (True,),
        resblock_updown=updown,
    )
    x, t = inputs(unet.config)
    assert unet(x, t).shape == x.shape


def test_a_state_dict_survives(tiny_unet, tiny_config, tmp_path):
    unet = tiny_unet(num_classes=3, null_class="row")
    torch.save(unet.state_dict(), tmp_path / "weights.pt")
    other = UNet(unet.config).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = inputs(unet.config)
    assert torch.equal(unet(*x), other(*x))


def test_labels_on_a_gpu_are_not_waited_for(tiny_unet):
    """What stands for a tensor on a GPU: one whose values must not be asked for."""
    unet = tiny_unet(num_classes=3, null_class="row")
    x, t = inputs(unet.config)
    labels = mock.Mock(spec=torch.Tensor, shape=(2,), dtype=torch.int64)
    labels.device = torch.device("cuda")
    check_inputs(unet.config, x, t, labels)
    labels.min.assert_not_called()
    labels.max.assert_not_called()


def test_the_network_is_one_graph_to_the_compiler(tiny_unet):
    unet = tiny_unet(num_classes=3, null_class="zero")
    x, t = inputs(unet.config)
    labels = torch.tensor([1, 3])
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, labels), unet(x, t, labels))
