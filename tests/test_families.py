"""Other code bases' checkpoints: each gives what its original gave, and says how it was read."""

import pytest
import torch
from checkpoint_cases import refuses
from peer_fixtures import NAMES, fixture, prefixed, write_checkpoint, zeros
from safetensors.torch import save_file

from ddpm_fast.checkpoint import CheckpointError, load_model, save_model
from ddpm_fast.inference import FusedUNet, prepare
from ddpm_fast.lucid_unet import LucidUNet
from ddpm_fast.schedule import NoiseSchedule

# The bound on eps, relative to its largest value; float32 in another order of operations.
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The path of each fixture's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(name, folder) for name in NAMES}


@pytest.fixture
def read(checkpoints):
    def load(name, **choices):
        return load_model(checkpoints[name], **fixture(name).choices | choices)

    return load


def error_of(model, name: str) -> float:
    made = fixture(name)
    with torch.no_grad():
        eps = model.unet(*made.inputs)
    return ((eps - made.eps).abs().max() / made.eps.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_eps_is_the_original_s(name, read):
    model = read(name)
    assert error_of(model, name) < TOLERANCE
    assert not model.unet.training and not any(p.requires_grad for p in model.unet.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_network_that_is_sampled_gives_the_same(name, read):
    model, made = read(name), fixture(name)
    network = prepare(model.unet, torch.device("cpu"), torch.float32)
    assert isinstance(network, LucidUNet if name == "lucidrains" else FusedUNet)
    eps = network(*made.inputs)
    assert (eps - made.eps).abs().max() < TOLERANCE * made.eps.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_read_is_a_model_of_ours(name, read, tmp_path):
    model = read(name)
    save_model(tmp_path / "a.safetensors", model)
    ours = load_model(tmp_path / "a.safetensors")
    assert ours.config == model.config and ours.conventions == model.conventions
    assert ours.schedule.betas.tolist() == model.schedule.betas.tolist()
    for part in ("prediction_type", "variance_type", "clip_denoised", "provenance"):
        assert getattr(ours, part) == getattr(model, part)
    weights = model.unet.state_dict()
    assert ours.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in ours.unet.state_dict().items())


OPENAI = (1e-5, "cos_sin", 0.0, "symmetric", "every")
CONVENTIONS = {
    "improved_diffusion": OPENAI,
    "guided_diffusion": OPENAI,
    "guided_diffusion_half": OPENAI,
    "ho": (1e-6, "sin_cos", 1.0, "asymmetric", "every"),
    "score_sde": (1e-6, "sin_cos", 1.0, "asymmetric", "last"),
    "w86763777": (1e-5, "interleaved", 0.0, "symmetric", "every"),
    "diffusers": (1e-6, "sin_cos", 1.0, "asymmetric", "every"),
    "diffusers_adm": OPENAI,
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_conventions_are_the_published_ones(name, read):
    """Beside the test of eps, in which a norm's eps hardly shows."""
    c = read(name).config
    found = (c.norm_eps, c.embedding_order, c.embedding_shift, c.downsample_padding, c.up_attention)
    assert found == CONVENTIONS[name] and c.norm_groups == 32
    assert c.mid_attention_norm == (name != "diffusers_adm")


LINEAR = NoiseSchedule.linear()
PROCESS = {
    "improved_diffusion": (NoiseSchedule.cosine(4000), "epsilon", "learned_range", True),
    "guided_diffusion": (NoiseSchedule.cosine(), "epsilon", "learned_range", True),
    "guided_diffusion_half": (LINEAR, "epsilon", "fixed_large", True),
    "ho": (LINEAR, "epsilon", "fixed_large", True),
    "score_sde": (NoiseSchedule.linear(50, 2e-3, 0.4), "epsilon", "fixed_large", False),
    "w86763777": (NoiseSchedule.linear(50), "epsilon", "fixed_large", False),
    "diffusers": (LINEAR, "epsilon", "fixed_large", True),
    "diffusers_adm": (LINEAR, "epsilon", "fixed_large", True),
}


@pytest.mark.parametrize("name", PROCESS)
def test_the_process_is_the_published_one(name, read):
    model, (schedule, *rest) = read(name), PROCESS[name]
    assert (model.schedule.betas == schedule.betas).all()
    assert [model.prediction_type, model.variance_type, model.clip_denoised] == rest


def test_lucidrains_buffers_tell_the_process(read, tmp_path):
    model = read("lucidrains")
    state = fixture("lucidrains").state
    assert torch.equal(torch.tensor(model.schedule.betas).float(), state["betas"])
    assert model.prediction_type == "v_prediction" and model.variance_type == "fixed_small"
    for schedule in (NoiseSchedule.linear(50, 2e-3, 0.4), NoiseSchedule.cosine(50)):
        snr = torch.tensor(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).float()
        for prediction, weight in (("epsilon", torch.ones(50)), ("sample", snr.clamp(max=5))):
            betas = torch.tensor(schedule.betas).float()
            torch.save(state | {"betas": betas, "loss_weight": weight}, tmp_path / "m.pt")
            other = load_model(tmp_path / "m.pt")
            assert (other.schedule.betas == schedule.betas).all()
            assert other.prediction_type == prediction
    torch.save(state | {"loss_weight": torch.full((50,), 7.0)}, tmp_path / "m.pt")
    assert load_model(tmp_path / "m.pt", prediction_type="sample").prediction_type == "sample"
    assert load_model(tmp_path / "m.pt").prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "name,words",
    [
        ("improved_diffusion", ["cos_sin with shift 0", "rescale_timesteps True", "eps 1e-5"]),
        (
            "guided_diffusion",
            ["head_channels 16: as asked for", "null_class none", "learned_range"],
        ),
        (
            "ho",
            ["sin_cos with shift 1", "asymmetric padding", "image_size 32: attention at level 1"],
        ),
        ("score_sde", ["weights ema.shadow_params", "last block of a level", "not clipped"]),
        ("w86763777", ["weights ema_model", "interleaved", "table of 50 timesteps", "not clipped"]),
        ("lucidrains", ["weights ema.ema_model.model", "RMS norms", "by the buffer ema.ema_model"]),
        ("diffusers", ["sin_cos with shift 1", "asymmetric padding", "clip True: its DDPM"]),
    ],
)
def test_what_was_chosen_is_said_and_why(name, words, checkpoints):
    sentences = load_model(checkpoints[name], **fixture(name).choices).conventions
    assert sentences[0].startswith("family ")
    for word in words:
        assert sum(word in sentence for sentence in sentences) == 1, (word, sentences)
    assert all("\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize("name", NAMES)
def test_wrappings_and_formats_do_not_matter(name, tmp_path):
    if name.startswith("diffusers"):
        return
    made = fixture(name)
    for number, write in enumerate(
        (
            lambda path: torch.save(prefixed("module.", made.state), path),
            lambda path: torch.save({"state_dict": made.state, "epoch": 3}, path),
            lambda path: torch.save(made.state, path, _use_new_zipfile_serialization=False),
            lambda path: save_file({k: v.contiguous() for k, v in made.state.items()}, path),
        )
    ):
        # A name that says nothing, and one that is wrong.
        path = tmp_path / (f"{number}.safetensors" if number % 2 else str(number))
        write(path)
        assert error_of(load_model(path, **made.choices), name) < TOLERANCE


def test_the_averaged_weights_are_read_unless_others_are_asked_for(checkpoints, tmp_path):
    made = fixture("w86763777")
    other = load_model(checkpoints["w86763777"], weights="net_model")
    assert not other.unet.conv_in.weight.any()
    other = load_model(checkpoints["score_sde"], weights="model.module")
    assert not other.unet.conv_in.weight.any()
    refuses(checkpoints["w86763777"], "has no weights 'net'; it has", ValueError, weights="net")
    # ermongroup/ddim: a list of the model, its optimizer, epoch, step and averages.
    made = fixture("ho")
    parts = [prefixed("module.", zeros(made.state)), {}, 3, 100, made.state]
    torch.save(parts, tmp_path / "ckpt.pth")
    model = load_model(tmp_path / "ckpt.pth")
    assert error_of(model, "ho") < TOLERANCE and "weights ema:" in " ".join(model.conventions)


def test_half_precision_weights_are_read(tmp_path):
    made = fixture("guided_diffusion")
    torch.save({k: v.half() for k, v in made.state.items()}, tmp_path / "m.pt")
    model = load_model(tmp_path / "m.pt", **made.choices)
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert 1e-6 < error_of(model, "guided_diffusion") < 1e-2


@pytest.mark.parametrize(
    "stem,want",
    [
        ("64x64_diffusion", {"head_channels": 64, "qkv_order": "qkv", "num_timesteps": 1000}),
        ("cifar10_uncond_50M_500K", {"num_heads": 4, "num_timesteps": 4000, "scale": 0.25}),
        ("imagenet64_cond_270M_250K", {"num_heads": 4, "num_timesteps": 4000, "scale": 1.0}),
        ("lsun_uncond_100M_2400K_bs64", {"num_heads": 1, "num_timesteps": 1000, "scale": 1.0}),
        ("anything_else", {"num_heads": 4, "qkv_order": "heads", "num_timesteps": 1000}),
    ],
)
def test_openai_s_released_files_are_known_by_name(stem, want, tmp_path):
    made = fixture("improved_diffusion")
    torch.save(made.state, tmp_path / f"{stem}.pt")
    model = load_model(tmp_path / f"{stem}.pt")
    found = {"num_timesteps": model.schedule.num_timesteps, "scale": model.config.timestep_scale}
    found |= {k: getattr(model.config, k) for k in ("num_heads", "head_channels", "qkv_order")}
    assert {key: found[key] for key in want} == want
    if stem != "anything_else":
        assert f"as released under the name {stem}" in " ".join(model.conventions)


@pytest.mark.parametrize(
    "choices,match",
    [
        ({"qkv_order": "both"}, "qkv_order must be one of"),
        ({"image_size": 0}, "image_size must be between"),
        ({"image_size": 2.5}, "image_size must be a whole number"),
        ({"image_size": (32, 32, 3)}, "image_size must be a whole number"),
        ({"depth": 3}, "argument for a checkpoint must be one of"),
        ({"qkv_order": "qkv"}, "qkv_order cannot be chosen for this checkpoint"),
        ({"null_class": "row"}, "null_class cannot be chosen for this checkpoint"),
    ],
)
def test_what_is_no_choice_is_a_usage_error(choices, match, checkpoints):
    with pytest.raises(ValueError, match=match) as caught:
        load_model(checkpoints["ho"], **choices)
    assert not isinstance(caught.value, CheckpointError)
    with pytest.raises(ValueError, match="cannot be chosen"):
        load_model("mnist", image_size=32)


def test_choices_change_the_model(read):
    assert read("ho", image_size=(32, 64)).config.sample_size == (32, 64)
    model = read("guided_diffusion", null_class="row", timesteps=500, schedule="linear")
    assert (model.config.num_classes, model.config.null_class) == (4, "row")
    assert model.schedule.betas.tolist() == NoiseSchedule.linear(500, 2e-4, 0.04).betas.tolist()
    assert model.config.timestep_scale == 1.0  # guided-diffusion's default
    scaled = read("guided_diffusion", timesteps=500, rescale_timesteps=True)
    assert scaled.config.timestep_scale == 2.0
    assert read("improved_diffusion", rescale_timesteps=False).config.timestep_scale == 1.0
    with pytest.raises(ValueError, match="of twice the channels of the input") as caught:
        read("guided_diffusion", variance_type="fixed_small")
    assert not isinstance(caught.value, CheckpointError)
    model = read("diffusers", prediction_type="v_prediction", variance_type="fixed_small")
    assert (model.prediction_type, model.variance_type) == ("v_prediction", "fixed_small")
