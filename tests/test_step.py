"""The fused step against the reference, bit for bit, at every CPU level."""

import itertools

import pytest
import torch
from step_cases import DTYPES, LEVELS, SHAPES, case, check_step, expected_step, fresh, same_bits

from ddpm_fast import noise, ops

pytestmark = pytest.mark.usefixtures("extension")


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


def next_buffer(shape, dtype, order, copies=1):
    size = (copies * shape[0], *shape[1:])
    return torch.full(size, torch.nan, dtype=dtype).contiguous(memory_format=order)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(2, 3, 33, 21), (3, 1, 28, 28), (2, 4, 5, 7)], ids=str)
def test_next_input_is_x_prev_as_the_network_wants_it(extension, level, shape):
    extension._set_cpu_level(level)
    orders = [torch.contiguous_format, torch.channels_last]
    for dtype, order, guided in itertools.product(DTYPES, orders, [False, True]):
        for name in ("cpu", "reference"):
            arguments = case(shape, guided=guided)
            buffer = next_buffer(shape, dtype, order, 2 if guided else 1)
            x_prev = ops.p_sample_step(**fresh(arguments), next_input=buffer, backend=name)
            assert same_bits(x_prev, ops.p_sample_step(**fresh(arguments)))
            want = torch.cat([x_prev, x_prev]) if guided else x_prev
            assert torch.equal(buffer, want.to(dtype))
            assert buffer.is_contiguous(memory_format=order)
            buffer.fill_(torch.nan)
            a = {**fresh(arguments), "x_t": arguments["x_t"].clone()}
            ops.p_sample_step_(**a, next_input=buffer, backend=name)
            assert same_bits(a["x_t"], x_prev) and torch.equal(buffer, want.to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_next_input_rounds_as_torch_does(extension, level, dtype):
    """Every number of the dtype, the ties between neighbours and what lies beside them."""
    extension._set_cpu_level(level)
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    up = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
    bits = numbers.view(torch.int32)
    ties = (bits + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)
    x = torch.cat([numbers, up, ties, (ties.view(torch.int32) + 1).view(torch.float32)])
    x = torch.cat([x, torch.tensor([65519.996, 65520.0, -3.4e38, 1e-8, -1e-45])])
    coefficients = torch.zeros(1, 16)
    coefficients[0, 3] = 1.0  # x_prev = x_t
    arguments = {"coefficients": coefficients, "index": torch.zeros(1, 4, dtype=torch.int32)}
    zero = torch.zeros(1, dtype=torch.int64)
    arguments |= {"row": zero, "seed": zero, "sample_index": zero}
    x = x.reshape(1, 1, -1)
    for size in (x.shape[2], 5):  # whole vectors, and fewer than one
        part = x[..., -size:].contiguous()
        buffer = next_buffer(part.shape, dtype, torch.contiguous_format)
        x_prev = ops.p_sample_step(part, part.clone(), **arguments, next_input=buffer)
        assert torch.equal(buffer.isnan(), part.isnan())
        want = x_prev.to(dtype)
        assert torch.equal(buffer.nan_to_num(), want.nan_to_num())
        signs = [b.view(torch.int16)[~part.isnan()] < 0 for b in (buffer, want)]
        assert torch.equal(*signs)


def far_apart(distance, *shape, dtype):
    """(N, ...) whose samples lie `distance` elements apart; the memory between is never touched."""
    inner = [1]
    for size in reversed(shape[2:]):
        inner.insert(0, inner[0] * size)
    try:
        memory = torch.empty((shape[0] - 1) * distance + inner[0] * shape[1], dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not lend that much address space: {error}")
    return memory.as_strided(shape, (distance, *inner))


@pytest.mark.parametrize("level", LEVELS)
def test_offsets_of_more_than_31_bits(extension, level):
    extension._set_cpu_level(level)
    arguments = case((2, 3, 5, 7), torch.bfloat16)
    want = ops.p_sample_step(**fresh(arguments))
    far = {
        name: far_apart(2**31 + 8, 2, 3, 5, 7, dtype=arguments[name].dtype).copy_(arguments[name])
        for name in ("model_output", "x_t")
    }
    buffer = far_apart(2**31 + 8, 2, 3, 5, 7, dtype=torch.bfloat16)
    ops.p_sample_step_(**{**fresh(arguments), **far}, next_input=buffer)
    assert same_bits(far["x_t"], want) and torch.equal(buffer, want.bfloat16())
