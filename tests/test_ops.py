"""The fused operators against the reference, bit for bit, at every CPU level."""

import itertools
import os

import numpy as np
import pytest
import torch

from ddpm_fast import backend, noise, ops, reference

LEVELS = backend.extension.cpu_levels_available() if backend.extension else ["missing"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # x_t, with a reason per row
    (2, 1),  # one number a sample
    (3, 5, 7),  # 1-D, less than a vector
    (2, 3, 9, 11),  # odd, a tail in every channel
    (1, 3, 64, 65),  # more than one chunk, the last one odd
    (2, 2, 3, 5, 7),  # volumes
    (3, 1, 28, 28),  # one channel
    (0, 3, 4, 4),  # no sample
    (2, 3, 0, 4),  # no element
]


@pytest.fixture(autouse=True)
def extension():
    if backend.extension is None:
        message = f"the compiled extension is missing: {backend.extension_error}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    before = backend.extension.cpu_level()
    threads = torch.get_num_threads()
    yield backend.extension
    backend.extension._set_cpu_level(before)
    torch.set_num_threads(threads)


def table(rows=4, learned=False):
    """Rows with different terms: all, noise-free and unclipped, few, all."""
    c = torch.zeros(rows, 16)
    c[:, :7] = torch.tensor([1.25, -0.75, 0.625, 0.375, 0.0, 0.1, 0.3])
    c[:, :7] += torch.arange(rows)[:, None] * 0.013
    c[:, 7], c[:, 8] = -7.3, -1.1
    c[:, 9], c[:, 10] = -1.0, 1.0
    c[:, 4] = torch.tensor([0.0, 0.0, 0.0, -0.125])[:rows]
    c[1, [2, 6]], c[1, 9:11] = 0.0, torch.tensor([-torch.inf, torch.inf])
    index = torch.zeros(rows, 4, dtype=torch.int32)
    index[:, 0], index[:, 1] = torch.arange(rows) * 10, torch.arange(1, rows + 1)
    if learned:
        index[[0, 2], 2] = 1
    return c, index


def case(shape, dtype=torch.float32, learned=False, guided=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    n = shape[0]
    channels = shape[1] * (2 if learned else 1)
    coefficients, index = table(learned=learned)
    return {
        "x_t": draw(*shape),
        "model_output": draw(n * (2 if guided else 1), channels, *shape[2:]).to(dtype),
        "coefficients": coefficients,
        "index": index,
        "row": (torch.arange(n) * 3) % 4,
        "seed": torch.arange(n) * 2**40 - 1,
        "sample_index": torch.arange(n) + 2**33,
        "guidance_scale": torch.tensor([1.7]) if guided else None,
        "previous_pred_xstart": draw(*shape),
    }


def expected_step(arguments, tensor=None):
    """(x_prev, pred_xstart) by the reference, with the contract's noise or `tensor`."""
    a = arguments
    if tensor is None:
        steps = a["index"][a["row"], 1].tolist()
        drawn = [
            noise.randn(int(s), [int(i)], step, a["x_t"].shape[1:])
            for s, i, step in zip(a["seed"], a["sample_index"], steps, strict=True)
        ]
        tensor = torch.from_numpy(np.concatenate([np.empty((0, *a["x_t"].shape[1:])), *drawn]))
    return reference.step(
        *(a[k] for k in ("coefficients", "index", "row", "x_t")),
        a["model_output"].float(),
        tensor.float(),
        a["previous_pred_xstart"],
        None if a["guidance_scale"] is None else a["guidance_scale"].reshape(()),
    )


def same_bits(got, want):
    return got.shape == want.shape and torch.equal(
        got.contiguous().view(torch.int32), want.contiguous().view(torch.int32)
    )


def fresh(arguments):
    """The arguments with the tensor that a step writes cloned, its memory order kept."""
    previous = arguments["previous_pred_xstart"]
    return {**arguments, "previous_pred_xstart": None if previous is None else previous.clone()}


def check_step(arguments, noise_tensor=None):
    want, want_pred = expected_step(arguments, noise_tensor)
    a = fresh(arguments)
    got = ops.p_sample_step(**a, noise=noise_tensor, backend="cpu")
    assert same_bits(got, want)
    assert same_bits(a["previous_pred_xstart"], want_pred)
    a = fresh(arguments)
    x_t = a.pop("x_t").clone()
    assert ops.p_sample_step_(x_t, **a, noise=noise_tensor, backend="cpu") is x_t
    assert same_bits(x_t, want)
    assert same_bits(a["previous_pred_xstart"], want_pred)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_reference(extension, level, shape):
    extension._set_cpu_level(level)
    for learned, guided, given in itertools.product([False, True], repeat=3):
        arguments = case(shape, learned=learned, guided=guided)
        check_step(arguments, torch.randn(shape) if given else None)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_takes_low_precision_and_memory_orders(extension, level, dtype):
    extension._set_cpu_level(level)
    orders = [torch.contiguous_format, torch.channels_last]
    for x_order, model_order, learned in itertools.product(orders, orders, [False, True]):
        arguments = case((2, 3, 33, 21), dtype, learned, guided=True)
        arguments["x_t"] = arguments["x_t"].contiguous(memory_format=x_order)
        arguments["model_output"] = arguments["model_output"].contiguous(memory_format=model_order)
        check_step(arguments)
        arguments["previous_pred_xstart"] = arguments["previous_pred_xstart"].contiguous(
            memory_format=torch.channels_last
        )
        check_step(arguments, torch.randn(2, 3, 33, 21))
        got = ops.p_sample_step(**fresh(arguments))
        assert got.is_contiguous(memory_format=x_order)


@pytest.mark.parametrize("level", LEVELS)
def test_every_float16_is_converted_exactly(extension, level):
    extension._set_cpu_level(level)
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()].reshape(1, 1, -1)
    arguments = case((1, 1, values.shape[2]))
    coefficients = torch.zeros(1, 16)
    coefficients[0, 1], coefficients[0, 2] = 1.0, 1.0
    coefficients[0, 9], coefficients[0, 10] = -torch.inf, torch.inf
    arguments |= {"coefficients": coefficients, "index": torch.zeros(1, 4, dtype=torch.int32)}
    arguments |= {"row": torch.zeros(1, dtype=torch.int64), "model_output": values}
    assert torch.equal(ops.p_sample_step(**arguments, backend="cpu"), values.float())


def test_step_takes_strided_and_unaligned_inputs():
    arguments = case((2, 3, 12, 10))
    plain = ops.p_sample_step(**fresh(arguments))
    big = torch.zeros(2, 6, 12, 21)
    big[:, ::2, :, 1::2] = arguments["model_output"]
    unaligned = torch.zeros(2 * 360 + 1)[1:].view(2, 3, 12, 10)
    unaligned.copy_(arguments["x_t"])
    got = ops.p_sample_step(
        **{**fresh(arguments), "model_output": big[:, ::2, :, 1::2], "x_t": unaligned}
    )
    assert same_bits(got, plain)
    wide = torch.zeros(2, 3, 12, 20)
    wide[..., ::2] = arguments["x_t"]
    assert same_bits(ops.p_sample_step(**{**fresh(arguments), "x_t": wide[..., ::2]}), plain)
    batch = torch.zeros(4, 3, 12, 10)  # a slice of a batch is written in place
    batch[::2] = arguments["x_t"]
    ops.p_sample_step_(**{**fresh(arguments), "x_t": batch[::2]})
    assert same_bits(batch[::2], plain) and batch[1::2].eq(0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_nan_and_infinity(extension, level):
    extension._set_cpu_level(level)
    arguments = case((2, 1, 70))
    arguments["row"] = torch.tensor([0, 1])
    arguments["x_t"][0, 0, 3] = torch.nan
    arguments["x_t"][1, 0, 69] = torch.inf
    status = torch.zeros(4, dtype=torch.int32)
    want, pred = expected_step(arguments)
    a = fresh(arguments)
    got = ops.p_sample_step(**a, status=status, backend="cpu")
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert torch.equal(a["previous_pred_xstart"].isnan(), pred.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert status.tolist() == [2, 0, 0, 0]
    ops.p_sample_step(**{**fresh(arguments), "row": torch.tensor([2, 2])}, status=status)
    assert status.tolist() == [2, 0, 0, 0]  # the first report stays
    # A coefficient of 0 skips its term, whatever the term's value is.
    coefficients = arguments["coefficients"].clone()
    coefficients[:, [0, 3]] = 0.0
    skipped = ops.p_sample_step(**{**fresh(arguments), "coefficients": coefficients})
    assert skipped.isfinite().all()


def test_status_names_the_first_bad_sample_and_stays_clear_without_one():
    arguments = case((5, 3, 40, 41))
    status = torch.zeros(4, dtype=torch.int32)
    ops.p_sample_step(**fresh(arguments), status=status)
    assert status.tolist() == [0, 0, 0, 0]
    arguments["x_t"][[2, 4], 2, 39, 40] = torch.nan
    ops.p_sample_step(**fresh(arguments), status=status)
    assert status.tolist() == [2, int(arguments["row"][2]), 2, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_count_does_not_matter(threads):
    torch.set_num_threads(threads)
    check_step(case((5, 3, 65, 64), learned=True))
    seed, index = torch.arange(9), torch.arange(9) + 5
    want = noise.randn(seed.numpy(), index.numpy(), 2, (3, 65, 64))
    assert same_bits(ops.randn(seed, index, (3, 65, 64), 2), torch.from_numpy(want))


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


def test_step_refuses_gradients():
    arguments = case((1, 1, 4))
    arguments["model_output"].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        ops.p_sample_step(**arguments)
    with torch.no_grad():
        ops.p_sample_step(**arguments)


@pytest.mark.parametrize("operator", ["randn", "q_sample", "p_sample_step", "p_sample_step_"])
def test_opcheck(operator):
    n = torch.arange(2)
    overload = getattr(torch.ops.ddpm_fast, operator).default
    a = case((2, 3, 4, 5), torch.bfloat16, learned=True, guided=True)
    step = [a[k] for k in ("x_t", "model_output", "coefficients", "index", "row", "seed")]
    step.append(a["sample_index"])
    optional = {"guidance_scale": a["guidance_scale"], "noise": torch.randn(2, 3, 4, 5)}
    optional |= {"previous_pred_xstart": a["previous_pred_xstart"]}
    optional |= {"status": torch.zeros(4, dtype=torch.int32)}
    x, table2 = torch.randn(2, 3, 4), torch.rand(3, 2)
    samples = {
        "randn": [((n, n, [3, 4], 5, 0), {})],
        "q_sample": [
            ((x, table2, n, n, n), {}),
            ((x.clone().requires_grad_(), table2, n, n, n), {}),
            ((x, table2, n, n, n), {"noise": torch.randn_like(x)}),
        ],
        "p_sample_step": [(tuple(step), optional)],
        "p_sample_step_": [(tuple(step), optional)],
    }[operator]
    for args, kwargs in samples:
        torch.library.opcheck(overload, args, kwargs)


BAD = [
    (
        {"x_t": torch.zeros(2, 3, 4, 4, dtype=torch.float64)},
        "x_t must be float32, but it is float64",
    ),
    ({"model_output": torch.zeros(2, 3, 4, 5)}, "model_output must have the shape of x_t"),
    ({"model_output": torch.zeros(1, 3, 4, 4)}, "model_output must have the shape of x_t"),
    ({"model_output": torch.zeros(2, 5, 4, 4)}, "C or 2 C channels"),
    ({"model_output": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "model_output must be float32"),
    ({"guidance_scale": torch.ones(1)}, "twice the samples"),
    ({"coefficients": torch.zeros(4, 15)}, "coefficients must have the shape"),
    ({"index": torch.zeros(4, 4, dtype=torch.int64)}, "index must be int32"),
    ({"index": torch.zeros(3, 4, dtype=torch.int32)}, "as many rows"),
    ({"row": torch.tensor([0, 4])}, r"row\[1\] is 4, but the table has the rows 0 to 3"),
    ({"row": torch.tensor([-1, 0])}, r"row\[0\] is -1"),
    ({"row": torch.tensor([0])}, "row must have the shape"),
    ({"seed": torch.zeros(2)}, "seed must be int64"),
    ({"sample_index": torch.zeros(2, 1, dtype=torch.int64)}, "sample_index must have the shape"),
    ({"noise": torch.zeros(2, 3, 4, 1)}, "noise must have the shape of x_t"),
    ({"noise": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, "noise must be float32"),
    ({"previous_pred_xstart": torch.zeros(1, 3, 4, 4)}, "previous_pred_xstart must have the shape"),
    ({"row": torch.tensor([3, 0]), "previous_pred_xstart": None}, "pass previous_pred_xstart"),
    ({"index": torch.ones(4, 4, dtype=torch.int32)}, "takes the variance from the model"),
    ({"status": torch.zeros(3, dtype=torch.int32)}, "status must be contiguous"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_are_one_sentence(change, message):
    arguments = {**case((2, 3, 4, 4)), **change}
    before = arguments["x_t"].clone()
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.ddpm_fast.p_sample_step_(**arguments)
    assert str(error.value).count("\n") == 0 and ".cpp" not in str(error.value)
    assert torch.equal(arguments["x_t"], before)


def test_shared_memory_is_refused():
    a = case((2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="must not share memory"):
        ops.p_sample_step_(**{**a, "model_output": a["x_t"]})
    with pytest.raises(RuntimeError, match="must not share memory"):
        ops.p_sample_step(**{**a, "previous_pred_xstart": a["x_t"]})
    with pytest.raises(RuntimeError, match="is written, so"):
        ops.p_sample_step_(**{**a, "x_t": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)})
    with pytest.raises(RuntimeError, match="is written, so"):
        ops.p_sample_step_(**{**a, "x_t": torch.zeros(2, 3, 4, 8)[..., ::2].transpose(2, 3)})


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_q_sample_and_randn_refuse_bad_arguments(name):
    n = torch.arange(2)
    with pytest.raises((RuntimeError, ValueError), match="step must be between"):
        ops.randn(n, n, (3,), 2**20, backend=name)
    with pytest.raises((RuntimeError, ValueError), match="sample_index must"):
        ops.randn(n, n[:1], (3,), backend=name)
    x, t = torch.zeros(2, 3), torch.rand(4, 2)
    with pytest.raises((RuntimeError, ValueError), match="timesteps"):
        ops.q_sample(x, t, torch.tensor([0, 4]), n, n, backend=name)
    with pytest.raises((RuntimeError, ValueError), match="noise must have the shape"):
        ops.q_sample(x, t, n, n, n, torch.zeros(3), backend=name)


def test_reference_backend_gives_the_same_step():
    arguments = case((3, 3, 9, 7), torch.bfloat16, learned=True, guided=True)
    runs = []
    for name in ("cpu", "reference"):
        a = fresh(arguments)
        status = torch.zeros(4, dtype=torch.int32)
        out = ops.p_sample_step(**a, status=status, backend=name)
        runs.append((out, a["previous_pred_xstart"], status.tolist()))
    assert same_bits(runs[0][0], runs[1][0]) and same_bits(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]
