"""The operators of a prepared network's layers beside oneDNN's and PyTorch's, and its replay.

    python -m pytest benchmarks/bench_layers.py --benchmark-only

As bench_ops.py; seconds a call go to results/layers.json.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import results
import torch
import torch.nn.functional as F
from alternating import BACKENDS, DEVICE, alternate, indices, random
from networks import MODELS, inputs
from torch import nn

from ddpm_fast import ops
from ddpm_fast.fused import Conv, UpsampleConv
from ddpm_fast.inference import prepare

LAST = torch.channels_last
T = 1000
OPERATORS = ("group_norm", "conv2d", "upsample_conv2d", "attention", "finish_conv2d", "table_rows")


@pytest.fixture(scope="module")
def figures() -> Iterator[dict]:
    """{operator: {case: {who: seconds a call}}}, written when all are measured."""
    rows: dict = {name: {} for name in (*OPERATORS, "replay")}
    with torch.inference_mode():
        yield rows
    results.write("layers", rows)


# Of a network's own operators; on a GPU they are Triton's with either backend.
OWN = BACKENDS[-1] if BACKENDS else ""
needs_own = pytest.mark.skipif(
    OWN not in ("cpu", "triton"), reason="neither C++ nor Triton is here"
)
needs_gpu = pytest.mark.skipif(OWN != "triton", reason="only networks on a GPU have it")
IMAGES = [(16, 128, 32, 32), (64, 24, 28, 28), (1, 256, 16, 16)]


@needs_own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_group_norm(benchmark, figures, shape, dtype):
    x = random(*shape).to(dtype).contiguous(memory_format=LAST)
    channels, groups = shape[1], 8
    weight, bias = random(channels), random(channels)
    own = weight.to(dtype), bias.to(dtype)
    target = torch.empty_like(x)
    settings = (None, None, weight, bias, groups, 1e-6, True)
    calls = {
        OWN: lambda: ops.group_norm(x, *settings, backend=OWN),
        "silu(group_norm(x))": lambda: F.silu(F.group_norm(x, groups, *own, 1e-6)),
        "copy": lambda: target.copy_(x),
    }
    kind = str(dtype).removeprefix("torch.")
    figures["group_norm"][f"{shape}, {kind}"] = alternate(benchmark, calls)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_finish_conv2d(benchmark, figures, shape, dtype):
    """Bias, residual and the sums of the next norm, beside the additions alone."""
    x, residual = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    bias = random(shape[1])
    own, target = bias.to(dtype)[:, None, None], torch.empty_like(x)
    calls = {
        OWN: lambda: ops.finish_conv2d(x, bias, residual, backend=OWN),
        "x + bias + residual": lambda: x + own + residual,
        "copy": lambda: target.copy_(x),
    }
    kind = str(dtype).removeprefix("torch.")
    figures["finish_conv2d"][f"{shape}, {kind}"] = alternate(benchmark, calls)


@needs_gpu
@pytest.mark.parametrize("n", [1, 64])
def test_table_rows(benchmark, figures, n):
    """As Ho et al.'s U-Net has them, beside a plain lookup of places that are known."""
    table, known = random(T, 4992), torch.arange(T, device=DEVICE).float()
    t = (37 * indices(n)) % T
    calls = {
        OWN: lambda: ops.table_rows(table, known, t, backend=OWN),
        "index_select": lambda: table.index_select(0, t),
    }
    figures["table_rows"][f"{n} samples"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 24, 28, 28), (1, 96, 7, 7), (16, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16)],
    ids=str,
)  # fmt: skip
def test_conv2d(benchmark, figures, monkeypatch, threads, shape, dtype):
    """3x3 to as many channels, with bias and residual: a layer of a prepared network."""
    if DEVICE.type != "cpu" or not ops.is_conv2d_fastest(dtype):
        pytest.skip("prepared networks use oneDNN here")
    channels, size = shape[1], shape[2:]
    weight, bias = random(channels, channels, 3, 3), random(channels)
    x, residual = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    own = Conv(weight, bias, dtype, size, (1, 1))
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    onednn = Conv(weight, bias, dtype, size, (1, 1))
    calls = {"cpu": lambda: own(x, residual), "oneDNN, packed": lambda: onednn(x, residual)}
    kind = str(dtype).removeprefix("torch.")
    figures["conv2d"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16)], ids=str)
def test_upsample_conv2d(benchmark, figures, monkeypatch, threads, shape, dtype):
    """Doubling and 3x3; oneDNN's makes all phases side by side, to be put in their places."""
    if DEVICE.type != "cpu" or not ops.is_conv2d_fastest(dtype):
        pytest.skip("prepared networks use oneDNN here")
    conv, size = nn.Conv2d(shape[1], shape[1], 3, padding=1), shape[2:]
    x = random(*shape).to(dtype).contiguous(memory_format=LAST)
    own = UpsampleConv(conv, dtype, size)
    monkeypatch.setattr(ops, "is_conv2d_fastest", lambda dtype: False)
    onednn = UpsampleConv(conv, dtype, size)
    calls = {"cpu": lambda: own(x), "oneDNN, packed, and copies": lambda: onednn(x)}
    kind = str(dtype).removeprefix("torch.")
    figures["upsample_conv2d"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 96, 7, 7), (1, 256, 16, 16), (16, 256, 16, 16), (1, 128, 64, 64)], ids=str
)
def test_attention(benchmark, figures, threads, shape, dtype):
    """One head, whose keys are its values: a layer of a prepared network."""
    if DEVICE.type != "cpu" or not ops.is_attention_fastest(dtype):
        pytest.skip("prepared networks use torch's here")
    query, key = (random(*shape).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    query *= shape[1] ** -0.5
    q, k = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (query, key))
    torch_calls = {
        "softmax and bmm": lambda: torch.bmm(torch.bmm(q, k.mT).softmax(-1), k),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
            q[:, None], k[:, None], k[:, None], scale=1.0
        ),
    }
    calls = {"cpu": lambda: ops.attention(query, key, key)} | torch_calls
    kind = str(dtype).removeprefix("torch.")
    figures["attention"][f"{shape}, {kind}, threads: {threads}"] = alternate(benchmark, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("model", MODELS)
def test_replay(benchmark, figures, model, batch_size, dtype):
    """A whole network, beside the same one whose layers Python calls."""
    if DEVICE.type != "cpu" or not BACKENDS:
        pytest.skip("networks are recorded on a CPU, by the extension")
    made = MODELS[model]()
    network, by_layers = (prepare(made.unet, DEVICE, dtype) for _ in range(2))
    by_layers._recordings = None
    x, t = inputs(made, batch_size)
    for _ in range(4):  # a group's second call is recorded, if it is worth it
        network(x, t)
    calls = {"cpu": lambda: network(x, t), "layer by layer": lambda: by_layers(x, t)}
    kind = str(dtype).removeprefix("torch.")
    figures["replay"][f"{model}, batch {batch_size}, {kind}"] = alternate(benchmark, calls)
