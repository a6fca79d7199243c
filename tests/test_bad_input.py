"""What the operators refuse, in a sentence: what was wanted and what came."""

import pytest
import torch
from step_cases import case

from ddpm_fast import ops

pytestmark = pytest.mark.usefixtures("extension")

BAD = [
    (
        {"x_t": torch.zeros(2, 3, 4, 4, dtype=torch.float64)},
        "x_t must be float32, but it is float64",
    ),
    ({"x_t": torch.tensor(1.0)}, r"x_t must have the shape \(N, C, ...\), but it is \(\)"),
    ({"x_t": torch.zeros(2)}, r"x_t must have the shape \(N, C, ...\), but it is \(2\)"),
    (
        {
            "x_t": torch.frombuffer(bytearray(388), dtype=torch.float32, count=96, offset=1).view(
                2, 3, 4, 4
            )
        },
        "x_t must begin at a multiple of its elements' 4 bytes",
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
    ({"next_input": torch.zeros(4, 3, 4, 4)}, "next_input must have the shape of x_t"),
    ({"next_input": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "next_input must be float32"),
    ({"next_input": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)}, "next_input is written, so"),
    ({"next_input": torch.zeros(2, 3, 4, 4, device="meta")}, "must be on one device"),
    ({"model_output": torch.zeros(2, 3, 4, 4, device="meta")}, "must be on one device"),
    ({"coefficients": torch.zeros(4, 16, device="meta")}, "must be on one device"),
    ({"row": torch.zeros(2, dtype=torch.int64, device="meta")}, "must be on one device"),
]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_are_one_sentence(change, message, in_place):
    arguments = {**case((2, 3, 4, 4)), **change}
    before = arguments["x_t"].clone()
    step = torch.ops.ddpm_fast.p_sample_step_ if in_place else torch.ops.ddpm_fast.p_sample_step
    with pytest.raises(RuntimeError, match=message) as error:
        step(**arguments)
    assert str(error.value).count("\n") == 0 and ".cpp" not in str(error.value)
    assert torch.equal(arguments["x_t"], before)


# What the reference says otherwise: a row by its range, "meta" by the name of the tensor.
SHARED = [
    (change, words) for change, words in BAD if r"row\[" not in words and "one device" not in words
]


@pytest.mark.parametrize(
    ("change", "message"), SHARED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_reference_refuses_the_same(change, message):
    sentences = []
    for name in ("cpu", "reference"):
        with pytest.raises((RuntimeError, ValueError)) as error:
            ops.p_sample_step_(**{**case((2, 3, 4, 4)), **change}, backend=name)
        sentences.append(str(error.value))
    if "variance" not in message and "previous_pred_xstart" not in message:
        assert sentences[0] == sentences[1]


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
    overlapping = torch.zeros(100).as_strided((2, 3, 4, 4), (7, 16, 4, 1))
    with pytest.raises(RuntimeError, match="is written, so"):
        ops.p_sample_step_(**{**a, "x_t": overlapping})
    a["noise"] = torch.zeros(2, 3, 4, 4)
    for name in ("x_t", "model_output", "noise"):
        with pytest.raises(RuntimeError, match=f"next_input is written while {name} is read"):
            ops.p_sample_step(**a, next_input=a[name])


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_tables_are_not_written(name):
    a = case((4, 16), guided=True)
    for change, message in (
        ({"coefficients": a["x_t"]}, "x_t is written while coefficients is read"),
        ({"guidance_scale": a["x_t"].flatten()[:1]}, "x_t is written while guidance_scale is read"),
        ({"status": a["index"][0]}, "status is written while index is read"),
        (
            {"coefficients": a["previous_pred_xstart"]},
            "previous_pred_xstart is written while coefficients is read",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.p_sample_step_(**{**a, **change}, backend=name)


def test_tensors_side_by_side_do_not_share_memory():
    a = case((2, 3, 4, 4))
    both = torch.zeros(2, 2, 3, 4, 4)
    both[0] = a["x_t"]
    a |= {"x_t": both[0], "next_input": both[1]}
    assert torch.equal(ops.p_sample_step(**a), both[1])


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


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_no_silent_broadcast(name):
    n, x, table = torch.arange(2), torch.zeros(2, 3), torch.rand(4, 2)
    for change, message in (
        ({"x_start": x.double()}, "x_start must be float32, but it is float64"),
        ({"coefficients": torch.rand(4, 3)}, r"coefficients must have the shape \(rows, 2\)"),
        ({"timesteps": n[:1]}, r"timesteps must have the shape \(2,\)"),
        ({"timesteps": n.int()}, "timesteps must be int64, but it is int32"),
        ({"seed": torch.tensor(3)}, r"seed must have the shape \(2,\)"),
        ({"noise": torch.zeros(2, 1)}, "noise must have the shape of x_start"),
        ({"noise": torch.zeros(2, 3).half()}, "noise must be float32, but it is float16"),
    ):
        arguments = {"x_start": x, "coefficients": table, "timesteps": n, "seed": n}
        with pytest.raises(RuntimeError, match=message):
            ops.q_sample(**{**arguments, "sample_index": n, **change}, backend=name)
