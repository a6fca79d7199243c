"""python -m ddpm_fast.convert: to our file, and to a folder that diffusers loads and samples."""

import json
import os

import numpy as np
import pytest
import torch
from peer_fixtures import NAMES, fixture, write_checkpoint

from ddpm_fast import cli, convert, sample
from ddpm_fast.checkpoint import Model, load_model, save_model
from ddpm_fast.families import diffusers_writer
from ddpm_fast.lucid_unet import LucidUNet, LucidUNetConfig
from ddpm_fast.reference import p_sample_loop
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.spacing import timesteps_for


def run(capsys, *words):
    """The command's status, and what it wrote to stdout and stderr."""
    status = cli.run(lambda: convert.main([str(word) for word in words]), "ddpm_fast.convert")
    out, err = capsys.readouterr()
    return status, out, err


def options(name: str) -> list[str]:
    choices = fixture(name).choices
    return [w for key, value in choices.items() for w in (f"--{key.replace('_', '-')}", str(value))]


def written(model: Model, folder, dtype=torch.float32) -> list[str]:
    return diffusers_writer.write(
        folder,
        *(model.unet, model.schedule, model.prediction_type, model.variance_type),
        model.clip_denoised,
        dtype,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_converted_and_sampled(name, tmp_path, capsys):
    path, out = write_checkpoint(name, tmp_path), tmp_path / "ours.safetensors"
    status, said, _ = run(capsys, path, out, *options(name))
    model = load_model(out)
    assert status == 0 and said.splitlines()[:-1] == model.conventions
    assert f"{sum(p.numel() for p in model.unet.parameters()):,} parameters" in said
    words = ["--class", "0,2"] if model.config.num_classes else []
    words += ["--num-samples", "2", "--steps", "2", "--device", "cpu", "--dtype", "float32"]
    runs = {}
    for part, source in (("ours", out), ("theirs", path)):
        if part == "theirs" and fixture(name).choices:
            continue  # sample reads it with the published choices
        arguments = ["--model", str(source), "--out", str(tmp_path / part), *words, "--npz"]
        assert cli.run(lambda arguments=arguments: sample.main(arguments), "sample") == 0
        said = capsys.readouterr().out
        assert said.splitlines()[: len(model.conventions)] == model.conventions
        runs[part] = json.loads((tmp_path / part / "run.json").read_text())["decides"]
        assert runs[part]["clip_denoised"] == model.clip_denoised
        assert runs[part]["conventions"] == model.conventions
    size = model.config.sample_size
    arrays = [np.load(tmp_path / part / f"samples_2x{size[0]}x{size[1]}x3.npz") for part in runs]
    assert all((array["arr_0"] == arrays[0]["arr_0"]).all() for array in arrays)
    assert arrays[0]["arr_0"].std() > 1


def test_what_is_asked_wrongly(model_file, tmp_path, capsys):
    for words, status, match in (
        ([tmp_path / "none", tmp_path / "a.safetensors"], 2, "there is no model"),
        ([model_file, tmp_path / "a.pt"], 2, "OUT must be the path of a .safetensors file"),
        ([model_file, tmp_path], 2, "OUT must be the path of a .safetensors file"),
        ([model_file, model_file], 2, "is there already: give another OUT, or --overwrite"),
        ([model_file, model_file, "--to", "diffusers"], 2, "OUT must be a folder"),
        ([model_file, tmp_path, "--to", "diffusers"], 2, "is there already"),
        ([model_file, tmp_path / "a.safetensors", "--image-size", 8], 2, "cannot be chosen"),
        ([model_file, tmp_path / "no" / "a.safetensors"], 1, "No such file"),
    ):
        got, out, err = run(capsys, *words)
        assert (got, out) == (status, "") and match in err, err
        assert len(err.splitlines()) == 1 and err.startswith("ddpm_fast.convert: ")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    status, _, err = run(capsys, tmp_path / "bad.safetensors", tmp_path / "a.safetensors")
    assert status == 1 and "not a readable safetensors file" in err
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", model_file.name]


def test_a_size_that_is_not_square(tmp_path, capsys):
    path, out = write_checkpoint("ho", tmp_path), tmp_path / "a.safetensors"
    status, said, _ = run(capsys, path, out, "--image-size", "32x64")
    assert status == 0 and "image_size (32, 64): as asked for" in said
    assert load_model(out).config.sample_shape == (3, 32, 64)


def test_overwrite_dtype_and_quiet(model_file, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    for words in ([], ["--overwrite", "--dtype", "float16"]):
        assert run(capsys, model_file, out, "--quiet", *words)[:2] == (0, "")
    before, after = load_model(model_file).unet, load_model(out).unet
    for key, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[key].half().float())


SHAPES = {
    "plain": {},
    "ho": {"num_heads": 1, "downsample_padding": "asymmetric"},
    "heads": {"num_heads": 2, "qkv_order": "heads"},
    "head_channels": {"head_channels": 4, "qkv_order": "heads", "attention_levels": (True, True)},
    "adm": {
        "resblock_updown": True,
        "scale_shift_norm": True,
        "embedding_order": "cos_sin",
        "embedding_shift": 0.0,
        "downsample_padding": "symmetric",
    },
    "interleaved": {"embedding_order": "interleaved", "embedding_shift": 0.0},
    "no_mid_norm": {"scale_shift_norm": True, "mid_attention_norm": False},
    "no_mid": {"mid_attention": False, "attention_levels": (True, False)},
    "three_channels": {"in_channels": 3, "channel_mult": (1, 1.5), "sample_size": (8, 16)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_for_diffusers_is_the_same_model(shape, tiny_model, tmp_path):
    model = tiny_model(**SHAPES[shape])
    model.prediction_type, model.variance_type = "v_prediction", "fixed_large"
    model.clip_denoised = False
    assert written(model, tmp_path / "folder") == []
    back = load_model(tmp_path / "folder")
    x = torch.randn(2, *model.config.sample_shape), torch.tensor([3, 70])
    torch.testing.assert_close(back.unet(*x), model.unet(*x), rtol=1e-5, atol=1e-5)
    assert (back.schedule.betas == model.schedule.betas).all()
    assert (back.prediction_type, back.variance_type) == ("v_prediction", "fixed_large")
    assert not back.clip_denoised


@pytest.mark.parametrize("null", ["none", "row", "zero"])
def test_classes_for_diffusers(null, tiny_model, tmp_path):
    model = tiny_model(num_classes=3, null_class=null)
    assert "passes no class labels" in written(model, tmp_path)[0]
    back = load_model(tmp_path, null_class="none" if null == "none" else "row")
    x = torch.randn(2, *model.config.sample_shape), torch.tensor([3, 70])
    labels = torch.tensor([1, 2 if null == "none" else 3])
    torch.testing.assert_close(back.unet(*x, labels), model.unet(*x, labels))


@pytest.mark.parametrize(
    "shape,match",
    [
        ({"embedding_shift": 0.5}, "a whole embedding_shift"),
        ({"embedding_channels": 16}, "base_channels as the embedding's"),
        ({"timestep_scale": 0.25}, "unscaled timesteps"),
        ({"up_attention": "last"}, "attention after each block"),
        ({"sample_size": (8,)}, "two spatial dimensions"),
        ({"channel_mult": (2, 2)}, "base_channels at the first level"),
        ({"num_heads": 2, "attention_levels": (True, True)}, "heads of one width"),
    ],
)
def test_what_diffusers_has_no_name_for_is_refused(shape, match, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=match):
        written(tiny_model(**shape), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_other_refusals_of_the_diffusers_writer(tiny_model, tmp_path):
    model = tiny_model(learn_sigma=True)
    model.variance_type = "learned"
    with pytest.raises(ValueError, match="not its logarithm"):
        written(model, tmp_path / "folder")
    model.variance_type = "learned_range"
    model.unet.conv_in.bias[0] = 1e6
    with pytest.raises(ValueError, match="not finite in torch"):
        written(model, tmp_path / "folder", torch.float16)
    config = LucidUNetConfig(3, (8, 8), 8, 8, (1,), (True,), (2,), (4,))
    model.unet = LucidUNet(config)
    with pytest.raises(ValueError, match="no lucidrains U-Net"):
        written(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


STEPS = 10


@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.linear(100, 1e-3, 0.2), NoiseSchedule.cosine(100), "betas"],
    ids=["linear", "cosine", "betas"],
)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_pipeline_loads_and_samples_the_same(schedule, variance, tiny_model, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    if schedule == "betas":
        schedule = NoiseSchedule(np.linspace(1e-3, 0.2, 100) ** 1.5)
    model = tiny_model(learn_sigma=variance == "learned_range", **SHAPES["adm"])
    model.schedule, model.variance_type = schedule, variance
    save_model(tmp_path / "m.safetensors", model)
    assert run(capsys, tmp_path / "m.safetensors", tmp_path / "d", "--to", "diffusers")[0] == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        2,
        torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    ours = p_sample_loop(
        model.unet,
        (2, *model.config.sample_shape),
        schedule,
        timesteps=timesteps_for(100, STEPS, "leading"),
        variance_type=variance,
        generator=torch.Generator().manual_seed(0),
    )
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 and ours.std() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_network_is_the_same(shape, tiny_model, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = tiny_model(**SHAPES[shape], num_classes=3, null_class="zero")
    written(model, tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t = torch.randn(2, *model.config.sample_shape), torch.tensor([3, 70])
    labels = torch.tensor([3, 1])
    with torch.no_grad():
        want, got = theirs(x, t, labels).sample, model.unet(x, t, labels)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
