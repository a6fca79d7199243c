"""A diffusers folder: all its layouts, what its configurations say, and what is not read."""

import json
import shutil

import pytest
import torch
from checkpoint_cases import refuses
from peer_fixtures import fixture, random_weights, write_checkpoint
from safetensors.torch import load_file

from ddpm_fast.checkpoint import load_model
from ddpm_fast.schedule import NoiseSchedule


def error_of(model) -> float:
    made = fixture("diffusers")
    with torch.no_grad():
        eps = model.unet(*made.inputs)
    return ((eps - made.eps).abs().max() / made.eps.abs().max()).item()


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint("diffusers", tmp_path)


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_diffusers_folders_of_all_layouts(folder, tmp_path):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    want = load_model(folder).sha256
    for path in (folder / "unet", weights):
        model = load_model(path)
        assert error_of(model) < 1e-5 and model.variance_type == "fixed_large"
        assert model.sha256 == want
    # As the first files of the hub: all in one folder, a pickle, the attention's layers old names.
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.glob("*/*.json"):
        shutil.copy(path, flat)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights)
    for new, name in old.items():
        state = {k.replace(new, name): v for k, v in state.items()}
    torch.save(state, flat / "diffusion_pytorch_model.bin")
    assert error_of(load_model(flat)) < 1e-5
    weights.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert error_of(load_model(folder)) < 1e-5
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    refuses(folder, "none of diffusion_pytorch_model.safetensors")


def test_a_diffusers_folder_without_a_scheduler(folder):
    (folder / "scheduler" / "scheduler_config.json").unlink()
    model = load_model(folder)
    assert (
        model.schedule.betas == NoiseSchedule.linear().betas
    ).all() and model.variance_type == "fixed_small"
    assert "no scheduler_config.json" in " ".join(model.conventions)


@pytest.mark.parametrize(
    "values,want",
    [
        ({"clip_sample": False}, {"clip_denoised": False}),
        ({"variance_type": "fixed_small_log"}, {"variance_type": "fixed_small"}),
        ({"variance_type": "fixed_large_log"}, {"variance_type": "fixed_large"}),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        ({"predict_epsilon": False}, {"prediction_type": "sample"}),
        ({"_class_name": "DDIMScheduler", "variance_type": None}, {"variance_type": "fixed_small"}),
    ],
)
def test_a_scheduler_s_configuration_decides(values, want, folder):
    change(folder / "scheduler" / "scheduler_config.json", **values)
    model = load_model(folder)
    assert {key: getattr(model, key) for key in want} == want


@pytest.mark.parametrize(
    "values,match",
    [
        ({"_class_name": "UNet2DConditionModel"}, "only a UNet2DModel is read"),
        ({"act_fn": "gelu"}, "act_fn='gelu' of the network is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' .* not supported"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_type must be one"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "attend at other levels"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types of its configuration is no list"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels of its configuration are"),
        ({"block_out_channels": [32, 65]}, "norm_groups must divide"),
        ({"block_out_channels": [10**9, 64]}, "block_out_channels"),
        ({"layers_per_block": 10**9}, "num_res_blocks must be between"),
        ({"layers_per_block": 16}, "residual blocks, but"),
        ({"norm_num_groups": None}, "norm_groups must be a whole number"),
        ({"out_channels": 5}, "takes 3 channels and gives 5"),
        ({"in_channels": "3"}, "in_channels must be a whole number"),
        ({"sample_size": [32]}, "sample_size must be a whole number"),
        ({"time_embedding_dim": 99}, "time_embedding_dim"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups"),
    ],
)
def test_a_network_that_unet_is_not(values, match, folder):
    change(folder / "unet" / "config.json", **values)
    refuses(folder, match)


@pytest.mark.parametrize(
    "values,match",
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "which is no DDPM's"),
        ({"thresholding": True}, "thresholding=True of the scheduler is not supported"),
        ({"clip_sample_range": 3.0}, "clip_sample_range=3.0"),
        ({"variance_type": "learned"}, "variance_type of its scheduler must be one of"),
        ({"variance_type": "learned_range"}, "variance type 'learned_range' is none for an output"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of"),
        ({"num_train_timesteps": 10**12}, "num_timesteps must be between"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_a_scheduler_that_is_no_process_of_ours(values, match, folder):
    change(folder / "scheduler" / "scheduler_config.json", **values)
    refuses(folder, match)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "7", " " * (5 << 20)])
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_hostile_json_in_a_folder(name, text, folder):
    (folder / name).write_text(text)
    refuses(folder, "is no configuration")


NETWORKS = {
    "its defaults": {},
    "Ho et al.'s": {
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4},
    "no attention": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "block_out_channels": (16, 24),
        "in_channels": 1,
        "out_channels": 2,
    },
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_diffusers_saves_is_read(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        **{
            "sample_size": (8, 16),
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        | NETWORKS[kind]
    ).eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(random_weights(shapes, 1))
    variance = "learned_range" if network.config.out_channels == 2 else "fixed_small"
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type=variance, clip_sample=False
    )
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    x, t = torch.randn(2, network.config.in_channels, 8, 16), torch.tensor([3, 970])
    labels = torch.tensor([0, 3]) if network.config.num_class_embeds else None
    with torch.no_grad():
        want, got = network(x, t, labels).sample, model.unet(x, t, labels)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (model.schedule.betas == NoiseSchedule.cosine().betas).all()
    assert (model.variance_type, model.clip_denoised) == (variance, False)
