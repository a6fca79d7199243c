"""Arguments of a sampling step, and what is expected of it: shared by the operators' tests."""

import numpy as np
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
    (2, 3, 4, 0),  # likewise, in the innermost dimension
]


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


def difference(got, want):
    """In how much two float32 tensors differ, in words; empty if they are equal bit for bit."""
    if got.shape != want.shape:
        return f"the shape is {tuple(got.shape)}, not {tuple(want.shape)}"
    if same_bits(got, want):
        return ""
    other = got.contiguous().view(torch.int32) != want.contiguous().view(torch.int32)
    most = (got - want).abs().max().item()
    place = tuple(other.nonzero()[0].tolist())
    return f"{int(other.sum())} of {other.numel()} values differ, by up to {most}, first {place}"


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
