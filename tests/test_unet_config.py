"""What a UNetConfig accepts, and that it survives its dict."""

import pytest

from ddpm_fast.unet_config import UNetConfig


def test_a_size_that_cannot_be_halved_is_refused_with_the_rule(tiny_config):
    four = {"channel_mult": (1, 1, 1, 1), "attention_levels": (False,) * 4}
    with pytest.raises(ValueError, match=r"4 levels needs 2 spatial .* multiples of 8, got \(28"):
        tiny_config(sample_size=(28, 28), **four)


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 0},
        {"in_channels": 1.0},
        {"sample_size": (8, 8, 8)},
        {"sample_size": ()},
        {"sample_size": 8},
        {"sample_size": (0, 8)},
        {"base_channels": -8},
        {"base_channels": 10**9},
        {"base_channels": 7},
        {"base_channels": 2, "norm_groups": 1, "num_heads": 1},
        {"channel_mult": ()},
        {"channel_mult": "12"},
        {"channel_mult": (1, 0)},
        {"channel_mult": (1,) * 11},
        {"num_res_blocks": 0},
        {"num_res_blocks": True},
        {"num_res_blocks": 10**9},
        {"attention_levels": (True,)},
        {"attention_levels": (0, 1)},
        {"mid_attention": "no"},
        {"num_heads": 0},
        {"num_heads": 3},
        {"head_channels": 5},
        {"norm_groups": 3},
        {"channel_mult": (1, 1.3)},
        {"channel_mult": (1, 0.01)},
        {"channel_mult": (1, float("nan"))},
        {"embedding_channels": 3},
        {"timestep_scale": -1.0},
        {"timestep_scale": "1"},
        {"up_attention": "none"},
        {"mid_attention_norm": 1},
        {"norm_groups": 0},
        {"norm_eps": float("nan")},
        {"dropout": 1.5},
        {"dropout": "0.1"},
        {"embedding_shift": 4.0},
        {"embedding_order": "sin"},
        {"qkv_order": None},
        {"downsample_padding": "both"},
        {"null_class": "row"},
        {"num_classes": 0, "null_class": "row"},
        {"learn_sigma": 1},
    ],
)
def test_a_configuration_that_makes_no_network_is_refused(change, tiny_config):
    with pytest.raises(ValueError) as caught:
        tiny_config(**change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_heads_matter_only_where_there_is_attention(tiny_config):
    assert tiny_config(head_channels=16).head_channels == 16  # the first level has 8 channels


def test_a_configuration_survives_its_dict(tiny_config):
    config = tiny_config(num_classes=3, null_class="zero", head_channels=4)
    assert UNetConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown U-Net fields"):
        UNetConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match="must be a dict"):
        UNetConfig.from_dict([1])
