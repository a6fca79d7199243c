"""The Triton kernels in Triton's interpreter against the reference, bit for bit.

The interpreter is chosen before triton is imported, so these tests run in a process of their own,
which `test_in_the_interpreter` starts. It computes on the CPU and shows the logic; that the
compiled code rounds as it does is read from the PTX in test_aot.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_in_the_interpreter
from step_cases import DTYPES, SHAPES, case, expected_step, fresh, same_bits
from test_bad_input import BAD
from test_noise import KNOWN_WORDS

from ddpm_fast import backend, noise, ops

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from ddpm_fast import triton_kernels, triton_ops  # noqa: E402


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@triton.jit
def words_kernel(counter, key, out):
    c0, c1, c2, c3 = triton_kernels.philox(
        *(tl.load(counter + i).to(tl.uint32) for i in range(4)),
        *(tl.load(key + i).to(tl.uint32) for i in range(2)),
    )
    tl.store(out, c0.to(tl.int64))
    tl.store(out + 1, c1.to(tl.int64))
    tl.store(out + 2, c2.to(tl.int64))
    tl.store(out + 3, c3.to(tl.int64))


@interpreted
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_published_words(counter, key, words):
    out = torch.zeros(4, dtype=torch.int64)
    words_kernel[(1,)](torch.tensor(counter), torch.tensor(key), out)
    assert out.tolist() == words


@triton.jit
def fma_kernel(x, out):
    tl.store(out, tl.fma(tl.load(x), tl.load(x + 1), tl.load(x + 2)))


@interpreted
def test_the_interpreter_has_a_fused_multiply_add():
    """Else equality of bits here would mean little."""
    x, out = torch.tensor([1 + 2.0**-23, 1 - 2.0**-23, -1.0]), torch.zeros(1)
    fma_kernel[(1,)](x, out)
    assert out.item() == -(2.0**-46)


@interpreted
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 13, 21)], ids=str)
def test_randn_equals_the_contract(shape):
    seed, index = torch.tensor([-1, 2**40 + 7, 3]), torch.tensor([0, 2**33 + 1, 5])
    got = triton_ops.randn(seed, index, shape, 9, noise.EDITING)
    want = noise.randn(seed.numpy(), index.numpy(), 9, shape, noise.EDITING)
    assert same_bits(got, torch.from_numpy(want))


def step(arguments, given=None, next_input=None, in_place=False):
    """(x_prev, status) of the Triton step; x_t is cloned where it is written."""
    a = arguments
    status = torch.zeros(4, dtype=torch.int32)
    x_t = a["x_t"].clone() if in_place else a["x_t"]
    got = triton_ops.p_sample_step(
        x_t,
        *(a[k] for k in ("model_output", "coefficients", "index", "row", "seed", "sample_index")),
        given,
        a["guidance_scale"],
        a["previous_pred_xstart"],
        status,
        next_input,
        in_place=in_place,
    )
    assert (got is x_t) == in_place
    return got, status.tolist()


def check_step(arguments, given=None, dtype=torch.float32, order=torch.contiguous_format):
    want, want_pred = expected_step(arguments, given)
    copies = 1 if arguments["guidance_scale"] is None else 2
    for in_place in (False, True):
        a = fresh(arguments)
        next_input = torch.empty(copies * len(want), *want.shape[1:], dtype=dtype)
        if next_input.ndim == 4:
            next_input = next_input.contiguous(memory_format=order)
        got, status = step(a, given, next_input, in_place)
        assert status == [0, 0, 0, 0]
        assert same_bits(got, want)
        assert same_bits(a["previous_pred_xstart"], want_pred)
        rounded = torch.cat([want.to(dtype)] * copies)
        if dtype == torch.bfloat16:  # the interpreter's rounding is not the hardware's
            torch.testing.assert_close(next_input, rounded, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(next_input, rounded)


SMALL = [shape for shape in SHAPES if np.prod(shape) < 4000]


@interpreted
@pytest.mark.parametrize("shape", [*SMALL, (1, 3, 15, 36)], ids=str)
def test_step_equals_the_reference(shape):
    for learned, guided in itertools.product([False, True], repeat=2):
        arguments = case(shape, learned=learned, guided=guided)
        check_step(arguments, torch.randn(shape) if learned != guided else None)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_takes_low_precision_and_memory_orders(dtype):
    orders = [torch.contiguous_format, torch.channels_last]
    for x_order, model_order in itertools.product(orders, orders):
        arguments = case((2, 3, 11, 9), dtype, learned=True, guided=True)
        arguments["x_t"] = arguments["x_t"].contiguous(memory_format=x_order)
        arguments["model_output"] = arguments["model_output"].contiguous(memory_format=model_order)
        check_step(arguments, None, dtype, x_order)
        got, _ = step(fresh(arguments))
        assert got.is_contiguous(memory_format=x_order)


@interpreted
def test_many_chunks_to_a_program_and_wide_places(monkeypatch):
    monkeypatch.setattr(triton_ops, "MANY", 2)
    monkeypatch.setattr(triton_ops, "LARGE", 1)
    check_step(case((2, 1, 29, 31), torch.float16, guided=True))
    arguments = case((2, 2, 12, 25))
    arguments["x_t"] = arguments["x_t"].contiguous(memory_format=torch.channels_last)
    check_step(arguments)


@interpreted
def test_step_takes_strided_and_unaligned_inputs():
    arguments = case((2, 3, 12, 10))
    plain, _ = step(fresh(arguments))
    big = torch.zeros(2, 6, 12, 21)
    big[:, ::2, :, 1::2] = arguments["model_output"]
    unaligned = torch.zeros(2 * 360 + 1)[1:].view(2, 3, 12, 10)
    unaligned.copy_(arguments["x_t"])
    changed = {"model_output": big[:, ::2, :, 1::2], "x_t": unaligned}
    assert same_bits(step(fresh(arguments) | changed)[0], plain)
    folded = arguments["x_t"].transpose(2, 3).contiguous().transpose(2, 3)  # no single pixel stride
    assert same_bits(step(fresh(arguments) | {"x_t": folded})[0], plain)


@interpreted
def test_nan_and_infinity():
    arguments = case((2, 1, 70))
    arguments["row"] = torch.tensor([0, 1])
    arguments["x_t"][0, 0, 3] = torch.nan
    want, pred = expected_step(arguments)
    a = fresh(arguments)
    got, status = step(a)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert torch.equal(a["previous_pred_xstart"].isnan(), pred.isnan()) and pred.isnan().any()
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert status == [2, 0, 0, 0]
    coefficients = arguments["coefficients"].clone()
    coefficients[:, [0, 3]] = 0.0  # skips the state's terms
    got, status = step(fresh(arguments) | {"coefficients": coefficients})
    assert got.isfinite().all() and status == [0, 0, 0, 0]


LEARNED_WITHOUT_CHANNELS = torch.zeros(4, 4, dtype=torch.int32)
LEARNED_WITHOUT_CHANNELS[2, 2] = 1
STEP_TOO_LARGE = torch.zeros(4, 4, dtype=torch.int32)
STEP_TOO_LARGE[2, 1] = noise.MAX_STEP
BAD_ROWS = [
    {"row": torch.tensor([0, 4, 1])},
    {"row": torch.tensor([0, -1, 1])},
    {"row": torch.tensor([0, 3, 1]), "previous_pred_xstart": None},
    {"row": torch.tensor([0, 2, 1]), "index": LEARNED_WITHOUT_CHANNELS},
    {"row": torch.tensor([0, 2, 1]), "index": STEP_TOO_LARGE},
]


@interpreted
@pytest.mark.parametrize("change", BAD_ROWS, ids=["high", "low", "previous", "variance", "noise"])
def test_a_bad_row_leaves_its_sample_as_it_was(change):
    arguments = {**case((3, 3, 7, 5)), **change}
    good = torch.tensor([0, 2])
    want, _ = step(fresh(arguments) | {"row": torch.tensor([0, 0, 1])})
    for in_place in (False, True):
        a, next_input = fresh(arguments), torch.empty(3, 3, 7, 5)
        got, status = step(a, None, next_input, in_place)
        assert status == [1, int(arguments["row"][1]), 1, 0]
        assert same_bits(got[1], arguments["x_t"][1]) and same_bits(got[good], want[good])
        assert same_bits(next_input, got)
        if arguments["previous_pred_xstart"] is not None:
            before, after = arguments["previous_pred_xstart"], a["previous_pred_xstart"]
            assert same_bits(after[1], before[1]) and not same_bits(after[0], before[0])


@interpreted
@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 9, 11), (2, 3, 0, 4)], ids=str)
def test_q_sample_equals_the_reference(shape):
    n = torch.arange(shape[0])
    x, table = torch.randn(shape), torch.rand(5, 2)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    for given in (None, torch.randn(shape)):
        got = triton_ops.q_sample(x, table, n + 3, n - 1, n + 7, given)
        want = ops.q_sample(x, table, n + 3, n - 1, n + 7, given, backend="reference")
        assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


@interpreted
def test_a_bad_timestep_makes_its_sample_nan():
    n, x, t = torch.arange(3), torch.randn(3, 5, 7), torch.tensor([0, 4, 3])
    x_t, _ = triton_ops.q_sample(x, torch.rand(4, 2), t, n, n, None)
    assert x_t[1].isnan().all() and x_t[[0, 2]].isfinite().all()


@interpreted
def test_q_sample_gradient():
    x, n = torch.randn(3, 2, 5, requires_grad=True), torch.arange(3)
    table, t = torch.rand(4, 2), torch.tensor([0, 3, 1])
    x_t, drawn = triton_ops.q_sample(x, table, t, n, n, None)
    assert not drawn.requires_grad
    weight = torch.randn_like(x_t)
    (x_t * weight).sum().backward()
    assert torch.equal(x.grad, table[t, 0].reshape(3, 1, 1) * weight)


def refusal(function, *args, **kwargs):
    with pytest.raises(RuntimeError) as error:
        function(*args, **kwargs)
    return str(error.value)


# What is wrong with a row itself is found on the device; torch finds "meta" before the kernels.
ELSEWHERE = (r"row\[", "pass previous_pred_xstart", "takes the variance", "must be on one device")
CHECKED = [change for change, message in BAD if not any(part in message for part in ELSEWHERE)]


@pytest.mark.skipif(backend.extension is None, reason="compares with the compiled operators")
@pytest.mark.parametrize("change", CHECKED, ids=lambda c: "-".join(c))
def test_bad_arguments_are_the_compiled_operators_sentences(change):
    a = {**case((2, 3, 4, 4)), **change}
    want = refusal(ops.p_sample_step_, **fresh(a), backend="cpu")
    a = {"noise": None, "status": None, "next_input": None, **a}
    order = ["x_t", "model_output", "coefficients", "index", "row", "seed", "sample_index"]
    order += ["noise", "guidance_scale", "previous_pred_xstart", "status", "next_input"]
    assert refusal(triton_ops.p_sample_step, *(a[k] for k in order), in_place=True) == want


def test_shared_memory_is_refused():
    a = case((2, 3, 4, 4))
    assert "must not share memory" in refusal(step, {**a, "previous_pred_xstart": a["x_t"]})
    assert "must not share memory" in refusal(step, a, None, a["x_t"])
    assert "must not share memory" in refusal(step, a, None, a["previous_pred_xstart"])
    twice = torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)
    assert "contiguous, channels_last or a slice" in refusal(step, a, None, twice)
    assert "next_input must have the shape" in refusal(step, a, None, torch.zeros(4, 3, 4, 4))
    assert "next_input must be float32" in refusal(step, a, None, a["x_t"].double())


def test_randn_and_q_sample_refuse_bad_arguments():
    n, x = torch.arange(2), torch.zeros(2, 3)
    assert "step must be between" in refusal(triton_ops.randn, n, n, (3,), 2**20, 0)
    assert "sample_index must" in refusal(triton_ops.randn, n, n[:1], (3,), 0, 0)
    table = torch.rand(4, 2)
    assert "noise must have the shape" in refusal(
        triton_ops.q_sample, x, table, n, n, n, torch.zeros(3)
    )
