"""The CUDA and Triton kernels on a GPU against the CPU's, bit for bit; only with a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from step_cases import DTYPES, SHAPES, case, difference, fresh, same_bits
from test_noise import KNOWN_WORDS

from ddpm_fast import backend, noise, ops

ORDERS = [torch.contiguous_format, torch.channels_last]


def obstacle(name: str) -> str:
    """Why nothing can run here on the backend; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if backend.extension is None:
        return f"the compiled extension is {backend.extension_error}"
    if name == "cuda" and not backend.extension.build_config()["cuda_linked"]:
        return "this build has no CUDA kernels: build it with nvcc beside a CUDA torch"
    return backend.triton_obstacle() if name == "triton" else ""


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(obstacle(name)), reason=obstacle(name))


@pytest.fixture(params=[pytest.param(name, marks=needs(name)) for name in ("cuda", "triton")])
def name(request) -> str:
    """The backend."""
    return request.param


def moved(t: torch.Tensor | None, device: str = "cuda") -> torch.Tensor | None:
    """The tensor on the GPU, its strides and its place in memory kept, and so its alignment."""
    if t is None:
        return None
    memory = t.new_empty(0).set_(t.untyped_storage()).to(device)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def all_moved(arguments, device: str = "cuda"):
    return {k: moved(v, device) for k, v in arguments.items()}


def empty_next_input(arguments, dtype, order):
    """NaN everywhere, with room for both halves under guidance."""
    x_t = arguments["x_t"]
    copies = 1 if arguments["guidance_scale"] is None else 2
    nan = torch.full((copies * len(x_t), *x_t.shape[1:]), torch.nan, dtype=dtype)
    return nan.contiguous(memory_format=order)


def check_step(arguments, name, device="cuda", next_dtype=None, next_order=ORDERS[0]):
    """Both forms of the step; with a dtype, what they leave as the next input too."""
    a = fresh(arguments)
    want = ops.p_sample_step(**a, backend="cpu")
    for step in (ops.p_sample_step, ops.p_sample_step_):
        on_gpu = all_moved(arguments, device)
        if next_dtype is not None:
            next_input = empty_next_input(arguments, next_dtype, next_order)
            on_gpu["next_input"] = moved(next_input, device)
        status = torch.zeros(4, dtype=torch.int32, device=device)
        got = step(**on_gpu, status=status, backend=name)
        assert (got is on_gpu["x_t"]) == (step is ops.p_sample_step_)
        assert got.device == on_gpu["x_t"].device
        assert not difference(got.cpu(), want)
        if a["previous_pred_xstart"] is not None:
            previous = on_gpu["previous_pred_xstart"].cpu()
            assert not difference(previous, a["previous_pred_xstart"])
        if next_dtype is not None:
            for part in on_gpu["next_input"].cpu().split(len(want)):
                assert torch.equal(part, want.to(next_dtype))
        assert status.tolist() == [0, 0, 0, 0]


def plain(arguments):
    """The case without a previous pred_xstart, which has a path of its own on CUDA."""
    return {**arguments, "previous_pred_xstart": None, "row": arguments["row"] % 3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_equals_the_cpu(name, shape):
    for learned, guided, given in itertools.product([False, True], repeat=3):
        arguments = case(shape, learned=learned, guided=guided)
        arguments["noise"] = torch.randn(shape) if given else None
        check_step(arguments, name)
        check_step(plain(arguments), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_takes_low_precision_and_memory_orders(name, dtype):
    for x_order, model_order, learned in itertools.product(ORDERS, ORDERS, [False, True]):
        arguments = case((2, 3, 33, 21), dtype, learned, guided=True)
        arguments["x_t"] = arguments["x_t"].contiguous(memory_format=x_order)
        arguments["model_output"] = arguments["model_output"].contiguous(memory_format=model_order)
        check_step(arguments, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 32, 24), (2, 3, 33, 21), (3, 1, 28, 28)], ids=str)
def test_next_input_is_x_prev_as_the_network_wants_it(name, shape, dtype):
    """In its dtype and order, and under guidance in both halves."""
    for order, guided, learned in itertools.product(ORDERS, [False, True], [False, True]):
        arguments = case(shape, dtype, learned, guided)
        check_step(arguments, name, next_dtype=dtype, next_order=order)
        check_step(plain(arguments), name, next_dtype=dtype, next_order=order)


def test_strided_and_unaligned_inputs(name):
    arguments = case((2, 3, 12, 10), torch.bfloat16)
    big = torch.zeros(2, 6, 12, 21, dtype=torch.bfloat16)
    big[:, ::2, :, 1::2] = arguments["model_output"]
    unaligned = torch.zeros(2 * 360 + 1)[1:].view(2, 3, 12, 10)
    unaligned.copy_(arguments["x_t"])
    check_step({**arguments, "model_output": big[:, ::2, :, 1::2]}, name)
    check_step({**arguments, "x_t": unaligned}, name)
    check_step({**arguments, "noise": unaligned.flip(0)}, name, next_dtype=torch.bfloat16)
    batch = torch.zeros(4, 3, 12, 10)
    batch[::2] = arguments["x_t"]
    check_step({**arguments, "x_t": batch[::2]}, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_variance_that_is_not_aligned(name, dtype):
    """With one channel a sample's elements lie together, but the variance begins 18 further on."""
    arguments = case((3, 1, 16), dtype, learned=True)
    wide = torch.full((3, 2, 18), torch.nan, dtype=dtype)
    wide[..., :16] = arguments["model_output"]
    check_step({**arguments, "model_output": wide[..., :16]}, name)
    check_step({**plain(arguments), "model_output": wide[..., :16]}, name)


# Counters and keys of the published words, but for the element: (seed, sample index, step, stream).
EXTREMES = [
    (0, 0, 0, 0),
    (-1, 2**63 - 1, noise.MAX_STEP - 1, noise.MAX_STREAM - 1),
    (0x299F31D0A4093822, 0x0370734413198A2E, 0x308D3, 0x85A),
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=["zeros", "ones", "pi"])
def test_randn_equals_the_contract(name, extreme):
    seed, index, step, stream = extreme
    tensors = (moved(torch.tensor([value])) for value in (seed, index))
    got = ops.randn(*tensors, (5, 1031), step, stream, backend=name).cpu()
    want = torch.from_numpy(noise.randn([seed], [index], step, (5, 1031), stream))
    assert not difference(got, want)
    if not any(extreme):
        published = noise.box_muller(KNOWN_WORDS[0][2])
        assert same_bits(got.flatten()[:4], torch.from_numpy(published))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randn_and_q_sample_equal_the_cpu(name, shape):
    n = shape[0]
    seed, index, t = torch.arange(n) - 1, torch.arange(n) * 2**31, torch.arange(n) % 5
    want = ops.randn(seed, index, shape[1:], 9, noise.EDITING, backend="cpu")
    got = ops.randn(moved(seed), moved(index), shape[1:], 9, noise.EDITING, backend=name)
    assert got.device == moved(seed).device
    assert not difference(got.cpu(), want)
    x_start = torch.randn(shape)
    for order in ORDERS if len(shape) == 4 else ORDERS[:1]:
        arguments = [x_start.contiguous(memory_format=order), torch.rand(5, 2), t, seed, index]
        for given in (None, torch.randn(shape)):
            want = ops.q_sample(*arguments, given, backend="cpu")
            got = ops.q_sample(*map(moved, (*arguments, given)), backend=name)
            assert same_bits(got[0].cpu(), want[0]) and same_bits(got[1].cpu(), want[1])


@needs("reference")
def test_reference_draws_the_contract_noise():
    arguments = case((4, 3, 9, 11))  # each sample at its own step
    got = ops.p_sample_step(**all_moved(arguments), backend="reference")
    torch.testing.assert_close(got.cpu(), ops.p_sample_step(**fresh(arguments), backend="cpu"))
    seed, index = torch.arange(4) - 1, torch.arange(4) * 2**31
    got = ops.randn(moved(seed), moved(index), (3, 7), 9, backend="reference")
    assert same_bits(got.cpu(), ops.randn(seed, index, (3, 7), 9, backend="cpu"))


def index_with(column: int, value: int) -> torch.Tensor:
    """A plan's index whose row 2 has the value."""
    index = torch.tensor([[0, 1, 0, 0]] * 4, dtype=torch.int32)
    index[2, column] = value
    return index


BAD = {
    "row too high": {"row": torch.tensor([0, 4, 1])},
    "row too low": {"row": torch.tensor([0, -1, 1])},
    "previous": {"row": torch.tensor([0, 3, 1]), "previous_pred_xstart": None},
    # The variance is learned, but the model has no channels for it.
    "variance": {"row": torch.tensor([0, 2, 1]), "index": index_with(2, 1)},
    "step too high": {"row": torch.tensor([0, 2, 1]), "index": index_with(1, noise.MAX_STEP)},
    "step too low": {"row": torch.tensor([0, 2, 1]), "index": index_with(1, -1)},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_row_leaves_its_sample_as_it_was(name, change):
    arguments = {**case((3, 3, 7, 5)), **change}
    good = torch.tensor([0, 2])
    with pytest.raises(RuntimeError):
        ops.p_sample_step(**fresh(arguments), backend="cpu")
    want = ops.p_sample_step(**{**fresh(arguments), "row": torch.tensor([0, 0, 1])}, backend="cpu")
    for step in (ops.p_sample_step, ops.p_sample_step_):
        on_gpu = all_moved(arguments)
        next_input = moved(empty_next_input(arguments, torch.float16, ORDERS[0]))
        status = moved(torch.zeros(4, dtype=torch.int32))
        got = step(**on_gpu, status=status, next_input=next_input, backend=name).cpu()
        assert status.tolist() == [1, int(arguments["row"][1]), 1, 0]
        assert same_bits(got[1], arguments["x_t"][1]) and same_bits(got[good], want[good])
        assert torch.equal(next_input.cpu(), got.half())
        before, after = arguments["previous_pred_xstart"], on_gpu["previous_pred_xstart"]
        if before is not None:
            assert same_bits(after[1].cpu(), before[1])
            assert not same_bits(after[0].cpu(), before[0])
        later = all_moved({**arguments, "row": arguments["row"].roll(1)})
        step(**later, status=status, backend=name)
        assert status.tolist() == [1, int(arguments["row"][1]), 1, 0]  # the first report stays


def test_nan_and_infinity(name):
    arguments = {**case((3, 1, 70)), "row": torch.tensor([0, 1, 2])}
    arguments["x_t"][1, 0, 3], arguments["x_t"][1, 0, 69] = torch.nan, torch.inf
    a = fresh(arguments)
    want = ops.p_sample_step(**a, backend="cpu")
    on_gpu, status = all_moved(arguments), moved(torch.zeros(4, dtype=torch.int32))
    got = ops.p_sample_step(**on_gpu, status=status, backend=name).cpu()
    pairs = (got, want), (on_gpu["previous_pred_xstart"].cpu(), a["previous_pred_xstart"])
    for mine, other in pairs:
        assert torch.equal(mine.isnan(), other.isnan()) and mine.isnan().any()
        assert same_bits(mine.nan_to_num(), other.nan_to_num())
    assert status.tolist() == [2, 1, 1, 0]


def test_a_bad_timestep_makes_its_sample_nan(name):
    n, x, table = torch.arange(3), torch.randn(3, 5, 7), torch.rand(4, 2)
    for bad in (-1, 4):
        t = torch.tensor([0, bad, 3])
        for given in (None, torch.randn_like(x)):
            x_t, _ = ops.q_sample(*map(moved, (x, table, t, n, n, given)), backend=name)
            assert x_t[1].isnan().all() and x_t[[0, 2]].isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_the_second_gpu(name):
    """The tensors' device counts, not the current one."""
    check_step(case((2, 3, 9, 11), learned=True, guided=True), name, "cuda:1")
    seed, index = torch.arange(2), torch.arange(2) + 5
    got = ops.randn(moved(seed, "cuda:1"), moved(index, "cuda:1"), (3, 9), 2, backend=name)
    assert got.get_device() == 1
    assert same_bits(got.cpu(), ops.randn(seed, index, (3, 9), 2, backend="cpu"))
    assert torch.cuda.current_device() == 0
