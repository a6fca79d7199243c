"""The kernels on NumPy arrays against the operators on tensors."""

import threading

import numpy as np
import pytest
import torch
from step_cases import SHAPES, case, fresh

from ddpm_fast import ops

TABLES = ("coefficients", "index", "row", "seed", "sample_index")


def as_arrays(arguments):
    """`arguments` for the binding; guidance is a number there."""
    arrays = {k: None if v is None else v.numpy().copy() for k, v in arguments.items()}
    if arrays["guidance_scale"] is not None:
        arrays["guidance_scale"] = float(arrays["guidance_scale"][0])
    return arrays


def same(array, tensor):
    return array.shape == tuple(tensor.shape) and array.tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_step_equals_the_operator(extension, shape, dtype):
    for learned, guided, given in np.ndindex(2, 2, 2):
        arguments = case(shape, dtype, bool(learned), bool(guided))
        arguments["noise"] = torch.randn(shape) if given else None
        arrays, a = as_arrays(arguments), fresh(arguments)
        want = ops.p_sample_step(**a, backend="cpu")
        assert same(extension.p_sample_step(**arrays), want)
        assert same(arrays["previous_pred_xstart"], a["previous_pred_xstart"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_sample_and_randn_equal_the_operators(extension, shape):
    n, coefficients, x = torch.arange(shape[0]) + 3, torch.rand(9, 2), torch.randn(shape)
    for given in (None, torch.randn(shape)):
        arguments = (x, coefficients, n, n, n, given)
        want = ops.q_sample(*arguments, backend="cpu")
        got = extension.q_sample(*(None if a is None else a.numpy() for a in arguments))
        assert same(got[0], want[0]) and same(got[1], want[1])
    count = int(np.prod(shape[1:]))
    got = extension.randn(n.numpy(), n.numpy(), count, 7)
    assert same(got, ops.randn(n, n, (count,), 7, backend="cpu"))


def test_calls_from_several_threads(extension):
    n = np.arange(64)
    want = extension.randn(n, n, 3072, 1)
    results = [None] * 4

    def draw(i):
        results[i] = extension.randn(n, n, 3072, 1)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(r, want) for r in results)


BAD = [
    ({"x_t": np.zeros((2, 3, 4, 4))}, "x_t must be float32, but it is float64"),
    ({"x_t": np.zeros((2, 3, 4, 8), np.float32)[..., ::2]}, "x_t must be C-contiguous"),
    ({"x_t": np.zeros((), np.float32)}, r"x_t must have the shape \(N, C, ...\)"),
    (
        {"x_t": np.zeros(400, np.uint8)[1:385].view(np.float32).reshape(2, 3, 4, 4)},
        "x_t must begin at a multiple of its elements' 4 bytes",
    ),
    ({"status": np.zeros(3, np.int32)}, r"status must have the shape \(4\,\)"),
    ({"model_output": np.zeros((2, 3, 4, 5), np.float32)}, "model_output must have the shape"),
    ({"model_output": np.zeros((2, 3, 4, 4))}, "model_output must be float32 or float16"),
    ({"model_output": np.zeros((4, 3, 4, 4), np.float32)[::2]}, "model_output must be C-cont"),
    ({"guidance_scale": 1.5}, r"model_output must have the shape \(4, 3, 4, 4\)"),
    ({"coefficients": np.zeros((4, 15), np.float32)}, "coefficients must have the shape"),
    ({"coefficients": np.zeros(16, np.float32)}, "coefficients must have two dimensions"),
    ({"index": np.zeros((4, 4), np.int64)}, "index must be int32, but it is int64"),
    ({"index": np.ones((4, 4), np.int32)}, "takes the variance from the model"),
    ({"row": np.array([0, 4])}, r"row\[1\] is 4, but the table has the rows 0 to 3"),
    ({"seed": np.zeros(2)}, "seed must be int64, but it is float64"),
    ({"sample_index": np.zeros(3, np.int64)}, "sample_index must have the shape"),
    ({"noise": np.zeros((2, 3, 4, 1), np.float32)}, "noise must have the shape"),
    ({"row": np.array([3, 0]), "previous_pred_xstart": None}, "pass previous_pred_xstart"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arrays_are_one_sentence(extension, change, message):
    arguments = {**as_arrays(case((2, 3, 4, 4))), **change}
    with pytest.raises(RuntimeError, match=message):
        extension.p_sample_step(**arguments)


def test_what_is_written_is_not_shared_and_not_read_only(extension):
    a = as_arrays(case((2, 3, 4, 4)))
    with pytest.raises(RuntimeError, match="must not share memory"):
        extension.p_sample_step(**{**a, "previous_pred_xstart": a["x_t"]})
    square = as_arrays(case((4, 16)))
    with pytest.raises(RuntimeError, match="previous_pred_xstart is written while coefficients"):
        extension.p_sample_step(**{**square, "coefficients": square["previous_pred_xstart"]})
    a["previous_pred_xstart"].setflags(write=False)
    with pytest.raises(RuntimeError, match="must be writeable"):
        extension.p_sample_step(**a)


def test_status_reports_what_is_not_finite(extension):
    a = as_arrays(case((3, 2, 5)))
    a["status"] = np.zeros(4, np.int32)
    extension.p_sample_step(**a)
    assert a["status"].tolist() == [0, 0, 0, 0]
    a["model_output"][1, 0, 2] = np.nan
    extension.p_sample_step(**a)
    assert a["status"].tolist() == [2, a["row"][1], 1, 0]


def test_randn_and_q_sample_refuse_bad_arrays(extension):
    n, x, table = np.arange(2), np.zeros((2, 3), np.float32), np.zeros((4, 2), np.float32)
    with pytest.raises(RuntimeError, match=r"sample_index must have the shape \(2,\)"):
        extension.randn(n, np.arange(3), 4, 0)
    with pytest.raises(RuntimeError, match="step must be between"):
        extension.randn(n, n, 4, 2**20)
    with pytest.raises(RuntimeError, match="elements must be 0 or more"):
        extension.randn(n, n, -1, 0)
    with pytest.raises(RuntimeError, match=r"timesteps\[1\] is 4"):
        extension.q_sample(x, table, np.array([0, 4]), n, n)
    with pytest.raises(RuntimeError, match="noise must have the shape"):
        extension.q_sample(x, table, n, n, n, x[:1])
