"""Layers of convolutions, their arguments, and which of them this CPU can do."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import backend, ops

LAST, BF16, F32 = torch.channels_last, torch.bfloat16, torch.float32
# (C_in, C_out, kernel, stride, padding, size): channels of every width of a block, also odd ones;
# images of fewer pixels than a tile has; a padding that hides whole rows of the kernel.
LAYERS = [
    (1, 24, (3, 3), (1, 1), (1, 1), (28, 28)),
    (24, 1, (3, 3), (1, 1), (1, 1), (28, 28)),
    (3, 128, (3, 3), (1, 1), (1, 1), (16, 16)),
    (128, 6, (3, 3), (1, 1), (1, 1), (16, 16)),
    (24, 48, (3, 3), (2, 2), (0, 0), (29, 29)),
    (48, 48, (3, 3), (2, 2), (1, 1), (14, 14)),
    (96, 96, (3, 3), (1, 1), (1, 1), (7, 7)),
    (64, 160, (3, 3), (1, 1), (1, 1), (4, 4)),
    (32, 40, (3, 3), (1, 1), (1, 1), (2, 2)),
    (24, 56, (3, 3), (1, 1), (1, 1), (1, 1)),
    (96, 192, (2, 2), (1, 1), (1, 1), (7, 7)),
    (48, 24, (1, 1), (1, 1), (0, 0), (14, 14)),
    (5, 7, (1, 1), (1, 1), (0, 0), (3, 5)),
    (32, 40, (1, 1), (1, 1), (0, 0), (3, 5)),  # fewer pixels than a tile, which sees them in place
    (64, 16, (1, 1), (1, 1), (0, 0), (7, 7)),
    (16, 17, (1, 1), (2, 2), (0, 0), (9, 8)),
    (16, 24, (1, 3), (1, 1), (0, 1), (1, 50)),
    (16, 32, (1, 2), (1, 2), (0, 1), (1, 33)),
    (7, 65, (5, 3), (2, 1), (4, 2), (6, 9)),
    (2, 3, (2, 2), (1, 1), (5, 5), (1, 1)),
    (256, 16, (3, 3), (1, 1), (1, 1), (40, 20)),  # more than one strip
    (256, 240, (3, 3), (1, 1), (1, 1), (4, 4)),  # weights of which a core has its part
]
# Those that Winograd's algorithm is for, and tiles of it that hang over the edges of the output.
LAYERS_3X3 = [layer for layer in LAYERS if layer[2:4] == ((3, 3), (1, 1))] + [
    (17, 130, (3, 3), (1, 1), (0, 2), (7, 10)),
    (512, 70, (3, 3), (1, 1), (1, 1), (9, 30)),  # more than one strip
]

needs_bfloat16 = pytest.mark.skipif(
    backend.conv_kernels(BF16) is None, reason="this CPU has no AVX-512 for bfloat16"
)


def case(layer, n, dtype, seed=0):
    """(x, weight, bias, residual)."""
    c_in, c_out, kernel, stride, padding, size = layer
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = (draw(n, c_in, *size) + 0.5).to(dtype).contiguous(memory_format=LAST)
    weight = (draw(c_out, c_in, *kernel) / (c_in * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
    residual = draw(n, c_out, *out).to(dtype).contiguous(memory_format=LAST)
    return x, weight, draw(c_out), residual


def convolution(layer, x, weight, bias=None, residual=None, winograd=False):
    packed = ops.pack_conv2d(weight.float(), x.dtype, winograd)
    return ops.conv2d(x, packed, bias, residual, *layer[1:5], winograd)
