"""`randn` and `q_sample` against the reference, and how torch sees the operators."""

import pytest
import torch
from step_cases import LEVELS, SHAPES, case, fresh, same_bits, table

from ddpm_fast import fallback, noise, ops

pytestmark = pytest.mark.usefixtures("extension")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn_and_q_sample_equal_the_reference(extension, level, shape):
    extension._set_cpu_level(level)
    n = shape[0]
    seed, index, t = torch.arange(n) - 1, torch.arange(n) * 2**31, torch.arange(n) % 5
    got = ops.randn(seed, index, shape[1:], 9, noise.EDITING, backend="cpu")
    assert same_bits(got, ops.randn(seed, index, shape[1:], 9, 2, backend="reference"))
    coefficients = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    x_start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    arguments = (x_start, coefficients, t, seed, index)
    given = torch.randn(shape)
    for tensor in (None, given):
        got = ops.q_sample(*arguments, tensor, backend="cpu")
        want = ops.q_sample(*arguments, tensor, backend="reference")
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    if x_start.ndim == 4:
        last = x_start.contiguous(memory_format=torch.channels_last)
        for tensor in (None, given):
            got = ops.q_sample(last, *arguments[1:], tensor, backend="cpu")
            want = ops.q_sample(*arguments, tensor, backend="reference")
            assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


def test_q_sample_gradient():
    x = torch.randn(3, 2, 5, requires_grad=True)
    coefficients, t = torch.rand(4, 2), torch.tensor([0, 3, 1])
    x_t, drawn = ops.q_sample(x, coefficients, t, torch.arange(3), torch.arange(3))
    assert not drawn.requires_grad
    weight = torch.randn_like(x_t)
    (x_t * weight).sum().backward()
    assert torch.equal(x.grad, coefficients[t, 0].reshape(3, 1, 1) * weight)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradient_of_given_noise(backend):
    x, given = torch.randn(3, 2, 5), torch.randn(3, 2, 5, requires_grad=True)
    coefficients, t, n = torch.rand(4, 2), torch.tensor([0, 3, 1]), torch.arange(3)
    x_t, _ = ops.q_sample(x, coefficients, t, n, n, given, backend=backend)
    weight = torch.randn_like(x_t)
    (x_t * weight).sum().backward()
    assert torch.equal(given.grad, coefficients[t, 1].reshape(3, 1, 1) * weight)


def test_gradient_at_a_bad_timestep_is_nan():
    """A GPU's q_sample makes such a sample NaN; its gradient must not index past the table."""
    grad = fallback.q_sample_gradients(
        torch.rand(4, 2), torch.tensor([0, 4, -1]), torch.ones(3, 2), [True, *[False] * 5]
    )[0]
    assert grad[0].isfinite().all() and grad[1:].isnan().all()


@pytest.mark.parametrize("name", ["x_t", "model_output", "coefficients", "guidance_scale"])
def test_step_refuses_gradients(name):
    arguments = case((1, 1, 4), guided=True)
    arguments[name].requires_grad_()
    for step in (ops.p_sample_step, ops.p_sample_step_):
        with pytest.raises(RuntimeError, match="not differentiable"):
            step(**arguments)
    with torch.no_grad():
        ops.p_sample_step(**arguments)


LAYERS = {
    "group_norm": lambda x, v: ops.group_norm(x, None, None, v, v, 2, 1e-6, True),
    "pack_conv2d": lambda x, v: ops.pack_conv2d(x, torch.float32),
    "conv2d": lambda x, v: ops.conv2d(x, v, None, None, 4, [1, 1], [1, 1], [0, 0]),
    "upsample_conv2d": lambda x, v: ops.upsample_conv2d(x, v, None, 4),
    "attention": lambda x, v: ops.attention(x, x, x),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_refuses_gradients(name):
    x = torch.zeros(1, 4, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable; call it under"):
        LAYERS[name](x, torch.ones(4))


def test_a_convolution_of_tensors_on_two_devices_is_refused():
    x = torch.zeros(1, 4, 1, 1, device="meta")
    with pytest.raises(RuntimeError, match="must be on one device, but they are on cpu and meta"):
        LAYERS["conv2d"](x, torch.ones(64))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_lie_as_the_state_does(backend):
    """Also where the kernels cannot walk it, so that what torch.compile expects is what comes."""
    a, n = case((2, 3, 5, 4)), torch.arange(2)
    for like in (
        a["x_t"].transpose(2, 3),
        a["x_t"].contiguous(memory_format=torch.channels_last),
    ):
        shaped = case(tuple(like.shape)) | {"x_t": like}
        want = torch.empty_like(like).stride()
        plain = {**shaped, "x_t": like.contiguous()}
        got = ops.p_sample_step(**fresh(shaped), backend=backend)
        assert got.stride() == want
        assert torch.equal(got, ops.p_sample_step(**fresh(plain), backend=backend))
        x_t, drawn = ops.q_sample(like, torch.rand(2, 2), n, n, n, backend=backend)
        assert x_t.stride() == want
        assert backend == "reference" or drawn.stride() == want


@pytest.mark.parametrize(
    "operator", ["randn", "q_sample", "p_sample_step", "p_sample_step_", "group_norm"]
)
def test_opcheck(operator):
    n = torch.arange(2)
    overload = getattr(torch.ops.ddpm_fast, operator).default
    a = case((2, 3, 4, 5), torch.bfloat16, learned=True, guided=True)
    step = [a[k] for k in ("x_t", "model_output", "coefficients", "index", "row", "seed")]
    step.append(a["sample_index"])
    optional = {"guidance_scale": a["guidance_scale"], "noise": torch.randn(2, 3, 4, 5)}
    optional |= {"previous_pred_xstart": a["previous_pred_xstart"]}
    optional |= {"status": torch.zeros(4, dtype=torch.int32)}
    optional |= {"next_input": torch.zeros(4, 3, 4, 5, dtype=torch.bfloat16)}
    x, rows = torch.randn(2, 3, 4), torch.rand(3, 2)
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    norm = (image, None, torch.randn(2, 3), torch.randn(1, 3), torch.randn(1, 3), 3, 1e-6, True)
    samples = {
        "randn": [((n, n, [3, 4], 5, 0), {})],
        "q_sample": [
            ((x, rows, n, n, n), {}),
            ((x.clone().requires_grad_(), rows, n, n, n), {}),
            ((x, rows, n, n, n), {"noise": torch.randn_like(x)}),
            ((x, rows, n, n, n), {"noise": torch.randn_like(x).requires_grad_()}),
            ((torch.randn(2, 3, 5, 4).transpose(2, 3), rows, n, n, n), {}),
        ],
        "p_sample_step": [
            (tuple(step), optional),
            ((a["x_t"].transpose(2, 3).contiguous().transpose(2, 3), *step[1:]), optional),
        ],
        "p_sample_step_": [(tuple(step), optional)],
        "group_norm": [(norm, {})],
    }[operator]
    for args, kwargs in samples:
        torch.library.opcheck(overload, args, kwargs)


def test_q_sample_without_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    n = torch.arange(2)
    with torch.no_grad():
        assert not ops.q_sample(x, torch.rand(4, 2), n, n, n)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_compiled_steps(dtype):
    """No graph break and one compilation; the same bits as the eager loop."""
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    def body(x, network_input, row, coefficients, index, seed, status):
        output = network_input * 0.5
        x = ops.p_sample_step_(
            x, output, coefficients, index, row, seed, seed, None, None, None, status, network_input
        )
        row.add_(1)
        return x

    def run(step):
        coefficients, index = (t.repeat(250, 1) for t in table())
        coefficients[:, 4] = 0
        index[:, 1] = torch.arange(1000)
        x = torch.linspace(-1, 1, 2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
        state = x, x.to(dtype, copy=True), torch.zeros(2, dtype=torch.int64)
        seed, status = torch.arange(2), torch.zeros(4, dtype=torch.int32)
        for _ in range(1000):
            step(*state, coefficients, index, seed, status)
        assert status.tolist() == [0, 0, 0, 0]
        return state[0]

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = run(torch.compile(body, fullgraph=True, backend=backend))
        assert len(frames) == 1
        assert same_bits(compiled, run(body))


def test_compiled_q_sample_and_randn():
    n, coefficients, x = torch.arange(2), torch.rand(4, 2), torch.randn(2, 3, 5)

    def both(x):
        return ops.q_sample(x, coefficients, n, n, n), ops.randn(n, n, (3, 5), 1)

    torch._dynamo.reset()
    compiled, eager = torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x)
    assert same_bits(compiled[0][0], eager[0][0]) and same_bits(compiled[1], eager[1])
