"""The sampling loop: what it computes, and what its samples may depend on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ddpm_fast import noise, reference
from ddpm_fast.checkpoint import Model
from ddpm_fast.plan import make_plan
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

SETTINGS = {"steps": 20, "backend": "cpu"}


@pytest.fixture
def model(class_model) -> Model:
    return class_model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "ddim"},
        {"method": "ddim", "eta": 0.7},
        {"method": "ddim", "eta": 0.7, "use_clipped_model_output": False},
        {"method": "dpmpp_2m"},
        {"method": "dpmpp_2m", "guidance_scale": 2.5},
        {"variance_type": "fixed_large"},
        {"clip_denoised": False},
        {"guidance_scale": 2.5},
    ],
    ids=str,
)
def test_fused_loop_equals_reference_loop(model, settings):
    """Fifty steps in float32 on the fused kernel and on the reference give the same bytes."""
    runs = [
        Sampler.from_model(model, steps=50, backend=backend, **settings).sample(
            3, seed=5, classes=[2, 0]
        )
        for backend in ("cpu", "reference")
    ]
    assert torch.equal(*runs)
    assert runs[0].isfinite().all()


def test_loop_is_the_published_chain(model):
    """The whole loop against p_sample written out with the published formulas in float64."""
    sampler = Sampler.from_model(model, steps=None, backend="cpu")
    x = sampler.sample(2, seed=9, start=4, classes=[1])
    unet = copy.deepcopy(model.unet).double()
    labels = torch.tensor([1, 1])

    def draw(step: int) -> torch.Tensor:
        return torch.from_numpy(noise.randn(9, [4, 5], step, (1, 8, 8))).double()

    want = draw(0)
    for step, t in enumerate(reversed(range(100)), start=1):
        times = torch.full((2,), t)
        output = unet(want, times, labels)
        want = reference.p_sample(model.schedule, output, want, times, draw(step)).sample
    assert (x - want).abs().max() < 1e-3
    assert want.abs().max() > 0.1


def test_sample_does_not_depend_on_its_neighbours(model):
    """Sample 42 is the same at any start, in any position, also in a padded last batch."""
    sampler = Sampler.from_model(model, **SETTINGS)
    run = {"seed": 3, "classes": [0, 1, 2], "batch_size": 4}
    whole = sampler.sample(6, start=40, **run)
    shifted = sampler.sample(1, start=42, **run)
    assert torch.equal(whole[2], shifted[0])
    assert torch.equal(whole, torch.cat([sampler.sample(1, start=i, **run) for i in range(40, 46)]))


def test_batch_size_changes_no_noise():
    """With a network whose arithmetic is exact at any batch size, nothing else differs."""
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    sampler = Sampler(lambda x, t: 0.25 * x, schedule, (3, 5, 7), backend="cpu")
    runs = [sampler.sample(9, seed=1, batch_size=b) for b in (1, 4, 9)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_seeds_and_samples_differ(model):
    sampler = Sampler.from_model(model, **SETTINGS)
    a, b = sampler.sample(2, seed=0), sampler.sample(2, seed=1)
    assert torch.equal(a, sampler.sample(2, seed=0))
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    big = (1 << 64) - 1  # seeds are 64 bits without a sign
    assert not torch.equal(a, sampler.sample(2, seed=big))


def test_two_streams_of_one_sampler_may_alternate(model):
    sampler = Sampler.from_model(model, **SETTINGS)
    want = [sampler.sample(4, seed=s, batch_size=2) for s in (0, 1)]
    streams = zip(*(sampler.batches(range(4), seed=s, batch_size=2) for s in (0, 1)), strict=True)
    got = [torch.cat(x) for x in zip(*([a[1], b[1]] for a, b in streams), strict=True)]
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_guidance_of_one_is_off_and_zero_is_unconditional(model):
    def draw(scale: float, classes) -> torch.Tensor:
        sampler = Sampler.from_model(model, guidance_scale=scale, **SETTINGS)
        return sampler.sample(2, classes=classes)

    assert torch.equal(draw(1.0, [1]), Sampler.from_model(model, **SETTINGS).sample(2, classes=[1]))
    assert (draw(0.0, [1]) - draw(1.0, None)).abs().max() < 1e-4
    assert (draw(3.0, [1]) - draw(1.0, [1])).abs().max() > 1e-3


def test_class_of_a_sample_follows_its_index(model):
    sampler = Sampler.from_model(model, **SETTINGS)
    assert sampler.labels(torch.arange(5, 9), [2, 0, 1]).tolist() == [1, 2, 0, 1]
    assert sampler.labels(torch.arange(2), None).tolist() == [3, 3]


def test_given_noise_takes_the_place_of_the_drawn_one(model):
    """The drawn noise, given, changes no byte, in padded batches too; none where there is none."""
    sampler, asked = Sampler.from_model(model, steps=5, backend="cpu"), []

    def draw(index: torch.Tensor, step: int) -> torch.Tensor | None:
        asked.append((index.tolist(), step))
        return (
            torch.from_numpy(noise.randn(9, index.tolist(), step, (1, 8, 8))) if step < 5 else None
        )

    run = {"start": 4, "batch_size": 2, "classes": [1]}
    x_T = torch.from_numpy(noise.randn(9, [4, 5, 6], 0, (1, 8, 8)))
    given = sampler.sample(3, seed=1, x_T=x_T, noise=draw, **run)
    assert torch.equal(given, sampler.sample(3, seed=9, **run))
    assert asked == [([4 + 2 * b, 5 + b], step) for b in (0, 1) for step in range(1, 6)]
    with pytest.raises(
        ValueError, match=r"noise must be of shape \(2, 1, 8, 8\), but \(1, 8\) was"
    ):
        sampler.sample(2, noise=lambda *_: torch.zeros(1, 8), **run)
    assert torch.equal(given, sampler.sample(3, seed=9, **run))  # and it goes on


def test_a_whole_plan_takes_the_place_of_its_settings():
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    settings = {"method": "ddim", "steps": 7, "eta": 0.3, "prediction_type": "sample"}
    runs = [
        Sampler(lambda x, t: x.sin(), what, (2, 3), backend="cpu", **rest).sample(2, seed=4)
        for what, rest in ((schedule, settings), (make_plan(schedule, **settings), {}))
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("network", [lambda x, t: x, lambda x, t: x.flatten(1).view_as(x)])
def test_a_network_may_return_its_input(network):
    settings = {"steps": 3, "sample_shape": (2, 5)}
    got = Sampler(network, NoiseSchedule.linear(50), **settings).sample(2)
    want = Sampler(lambda x, t: x.clone(), NoiseSchedule.linear(50), **settings).sample(2)
    assert torch.equal(got, want)


def test_callback_sees_every_state(model):
    seen = []
    sampler = Sampler.from_model(model, **SETTINGS)
    x = sampler.sample(
        3, batch_size=2, callback=lambda i, done, x: seen.append((i.tolist(), done, x.clone()))
    )
    assert [s[1] for s in seen] == [*range(21), *range(21)]
    assert seen[-1][0] == [2] and torch.equal(seen[-1][2], x[2:])
    assert torch.equal(seen[0][2], torch.from_numpy(noise.randn(0, [0, 1], 0, (1, 8, 8))))


@pytest.mark.parametrize("shape", [(2, 16), (4, 6, 10), (1, 4, 6, 2)])
def test_any_callable_and_any_rank(shape):
    def network(x, t):
        assert x.dtype == torch.bfloat16 and t.dtype == torch.int64
        return torch.tanh(x) * (t / 100).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    runs = [
        Sampler(
            network,
            NoiseSchedule.cosine(100),
            shape,
            prediction_type="v_prediction",
            steps=10,
            dtype=torch.bfloat16,
            backend=backend,
        ).sample(3, batch_size=2)
        for backend in ("cpu", "reference")
    ]
    assert runs[0].shape == (3, *shape) and torch.equal(*runs)


def test_learned_variance_model(tiny_model):
    model = tiny_model(learn_sigma=True)
    model.variance_type = "learned_range"
    runs = [
        Sampler.from_model(model, steps=20, backend=b, **v).sample(2)
        for b in ("cpu", "reference")
        for v in ({}, {"variance_type": "fixed_small"})
    ]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


def test_values_that_are_not_finite_are_named(model):
    sampler = Sampler(
        lambda x, t: torch.where(t.view(-1, 1, 1, 1) < 30, torch.nan, x),
        NoiseSchedule.linear(50),
        (1, 4, 4),
        backend="cpu",
    )
    message = "sample 7 has a value that is not finite after step 21 .* overflows in float32$"
    with pytest.raises(RuntimeError, match=message):
        sampler.sample(1, start=7)


def test_padding_cannot_fail_a_run():
    """A network that breaks at the third place of a batch, which nobody asked for."""

    def network(x, t):
        return torch.cat((x[:2], x[2:] * (1 if torch.equal(x[1:2], x[2:3]) else torch.nan)))

    sampler = Sampler(network, NoiseSchedule.linear(20), (1, 2, 2), backend="cpu")
    assert sampler.sample(2, batch_size=3).isfinite().all()
    last = (1 << 63) - 3
    assert sampler.sample(2, start=last, batch_size=3).isfinite().all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_a_copy_has_buffers_of_its_own(model, copied):
    sampler = Sampler.from_model(model, **SETTINGS)
    want = sampler.sample(2)
    other = copied(sampler)
    assert other.memory_held == 0 and torch.equal(other.sample(2), want)
    with torch.no_grad():
        other.network.conv_out.bias += 0.1
    assert not torch.equal(other.sample(2), want) and torch.equal(sampler.sample(2), want)


def test_inference_mode_and_plain_calls_may_alternate(model):
    sampler = Sampler.from_model(model, **SETTINGS)
    with torch.inference_mode():
        a = sampler.sample(1)
    b = sampler.sample(1)
    with torch.inference_mode():
        assert torch.equal(a, b) and torch.equal(b, sampler.sample(1))


def test_a_conditional_network_of_ones_own():
    seen = []

    def network(x, t, class_labels):
        seen.append(class_labels.tolist())
        return 0.1 * x * class_labels.view(-1, 1)

    settings = {"num_classes": 4, "null_class": 4, "guidance_scale": 2.0, "steps": 2}
    sampler = Sampler(network, NoiseSchedule.linear(20), (3,), backend="cpu", **settings)
    assert sampler.sample(2, classes=[1, 3]).isfinite().all()
    assert seen == [[1, 3, 4, 4]] * 2
    with pytest.raises(ValueError, match="class-conditional"):
        Sampler(network, NoiseSchedule.linear(20), (3,), guidance_scale=2.0, null_class=4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_samples": 0}, "number of samples"),
        ({"batch_size": 0}, "batch size"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"start": -1}, "first sample"),
        ({"classes": [3]}, "no class 3"),
        ({"classes": [-1]}, "no class -1"),
        ({"classes": []}, "at least one"),
        ({"classes": [True]}, "no class True"),
        ({"classes": "1"}, "no class 1"),
    ],
)
def test_bad_runs_are_refused_in_a_sentence(model, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Sampler.from_model(model, **SETTINGS).sample(**({"num_samples": 1} | changes))
    assert "\n" not in str(error.value)


def test_conditions_that_a_model_lacks_are_refused(model, tiny_model):
    plain = tiny_model()
    with pytest.raises(ValueError, match="without them"):
        Sampler.from_model(plain, **SETTINGS).sample(1, classes=[0])
    with pytest.raises(ValueError, match="null class"):
        Sampler.from_model(plain, guidance_scale=2.0, **SETTINGS)
    with pytest.raises(ValueError, match="towards a class"):
        Sampler.from_model(model, guidance_scale=2.0, **SETTINGS).sample(1)
    needy = tiny_model(num_classes=3)
    with pytest.raises(ValueError, match="always needs a class"):
        Sampler.from_model(needy, **SETTINGS).sample(1)
