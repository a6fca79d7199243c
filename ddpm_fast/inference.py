"""A trained `UNet` as a network that computes the same function faster.

Nothing is compiled: weights are packed once, what the timestep decides is tabulated, and each block
is a few calls of fused operators. `prepare` is what the sampler calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backend as backends
from . import fused, fused_cuda, ops
from .device import give_back_freed_memory, keep_freed_memory, memory_format, with_index
from .fused import CpuLayers
from .fused_blocks import FusedResampler, FusedResBlock, FusedStage, Layers, fits_half
from .fused_cuda import GpuLayers
from .fused_layer import Layer, Size
from .moments import tensor
from .replay import Recordings, is_plain, is_watched
from .unet import ResBlock, Stage, UNet, check_inputs
from .workers import group_size, is_ending, on_a_worker, workers


class FusedUNet(Layer):
    """Called as the `UNet` that it was made of, with x of `dtype`; it has no gradients.

    A bfloat16 network on a CPU also takes x as float32, its `input_dtype`, and then gives float32:
    the more exact way, for x up to 65504, the largest float16.
    It can be copied and pickled, but has no parameters: keep the model's `state_dict`, not its.
    On a CPU neither its layers nor their settings are to be changed once it was called (replay.py).

    Args:
        unet: on the layers' device; it is copied, and may change afterwards.
        layers: what it is made of, for a CPU or a GPU.
    """

    def __init__(self, unet: UNet, layers: Layers) -> None:
        super().__init__()
        self.config, self.device, self.dtype = unet.config, layers.device, layers.dtype
        self.input_dtype = layers.input_dtype
        self.in_groups, self.is_own = layers.in_groups, layers.is_own
        self.table = layers.time_table(unet)
        sizes = self._sizes()
        level = 0
        self.conv_in = layers.conv(unet.conv_in, sizes[level], exact=True)
        skips = [unet.config.base_channels]
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for module in unet.down:
            self.down.append(self._fused(module, layers, sizes[level]))
            if isinstance(module, Stage):
                skips.append(module.block.conv1.out_channels)
            else:
                skips.append(skips[-1])
                level += 1
        for module in unet.middle:
            self.middle.append(self._fused(module, layers, sizes[level]))
        for module in unet.up:
            if isinstance(module, Stage):
                self.up.append(self._fused(module, layers, sizes[level], skips.pop()))
            else:
                self.up.append(self._fused(module, layers, sizes[level]))
                level -= 1
        self.conv_out = layers.conv(unet.conv_out, sizes[0], exact=True)
        self.norm_out = layers.norm(unet.norm_out, to=self.conv_out)
        if self.norm_out.half:
            self.conv_out.half = fits_half(unet.norm_out, unet.conv_out, sizes[0])
        self._recordings = Recordings() if layers.device.type == "cpu" else None
        inner = [m for m in self.modules() if m is not self]
        self._inner_hooks = [h for m in inner for h in (m._forward_pre_hooks, m._forward_hooks)]
        self.packing = fused.PACKING
        self.eval().requires_grad_(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        fused.require_packing(state.get("packing"), fused.PACKING)
        super().__setstate__(state)

    def _sizes(self) -> list[Size]:
        """(H, W) of each level, for samples of the size that the model was trained on."""
        size, levels = self.config.sample_size, range(len(self.config.channel_mult))
        height, width = (1, *size) if len(size) == 1 else size
        return [(max(1, height >> level), width >> level) for level in levels]

    def _fused(
        self, module: nn.Module, layers: Layers, size: Size, skip_channels: int = 0
    ) -> nn.Module:
        if isinstance(module, Stage):
            return FusedStage(module, self.table, layers, size, skip_channels)
        if isinstance(module, ResBlock):
            return FusedResBlock(module, self.table, layers, size)
        return FusedResampler(module, layers, size)

    def _no_autocast(self) -> torch.autocast:
        """A host's does not change a network whose dtypes were chosen when it was prepared."""
        return torch.autocast(self.device.type, enabled=False)

    def _run(self, x: Tensor, rows: Tensor) -> Tensor:
        parts = rows.split(self.table.widths, 1)
        given = x.dtype
        if given != self.dtype:
            x = x.half() if self.conv_in.takes_half else x.to(self.dtype)
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h, None, parts)
            skips.append(h)
        for module in self.middle:
            h = module(h, None, parts)
        for module in self.up:
            h = module(h, skips.pop() if isinstance(module, FusedStage) else None, parts)
        return tensor(self.conv_out(self.norm_out(h))).to(given)

    def expect(self, timesteps: Sequence[float]) -> None:
        """Tabulate these timesteps, which will be asked for; others may be too, but not on a GPU
        (see `DeviceTimeTable`).
        """
        with self._no_autocast():
            self.table.expect(timesteps)
        give_back_freed_memory()  # of what came before the projections

    def _group_size(self, batch_size: int) -> int:
        """How many samples a core takes at once by itself; 0: all cores share each layer."""
        threads = torch.get_num_threads()
        if not self.in_groups or threads == 1 or is_ending():
            return 0
        height, width = self._sizes()[0]
        bytes_each = self.config.base_channels * height * width * self.dtype.itemsize
        return group_size(batch_size, bytes_each, self.dtype.itemsize, threads, self.is_own)

    def _is_replayed(self, x: Tensor) -> bool:
        """Not where something is to see each layer, or each operator, as it is called."""
        if self._recordings is None or not backends.is_available() or any(self._inner_hooks):
            return False
        return is_plain(x) and not is_watched()

    def _replay(self, x: Tensor, rows: Tensor) -> Tensor:
        return self._recordings(self._run, x, rows)

    def _run_groups(
        self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: Tensor, size: int
    ) -> Tensor:
        groups = x.split(size)
        shared = [rows] * len(groups) if len(rows) == 1 else rows.split(size)

        @torch.no_grad()  # which each thread has for itself
        def work(group: Tensor, rows: Tensor) -> Tensor:
            return run(group, rows)

        parts = list(workers(torch.get_num_threads()).map(work, groups, shared))
        return on_a_worker(torch.cat, parts)

    def uses_workers(self, batch_size: int) -> bool:
        """Whether samples are shared out among `workers`, instead of each layer among threads."""
        return self._group_size(batch_size) > 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedUNet:
        """What `to`, `cuda`, `half` and their like call, here to be refused."""
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (moved.device, moved.dtype) != (self.device, self.dtype):
            have, asked = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, moved.dtype))
            place = "the CPU" if self.device.type == "cpu" else str(self.device)
            raise ValueError(
                f"this network was prepared for {have} on {place}, and can only be there: prepare"
                f" the model again, for {asked} on {moved.device}"
            )
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        check_inputs(self.config, x, t, class_labels)
        if x.dtype not in (self.dtype, self.input_dtype):
            known = dict.fromkeys((self.dtype, self.input_dtype))
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
            got = str(x.dtype).removeprefix("torch.")
            raise ValueError(
                f"x must be {wanted}, as the network was prepared for, but it is {got}"
            )
        x = x.unsqueeze(2) if self.config.dims == 1 else x
        x = x.contiguous(memory_format=torch.channels_last)
        size = self._group_size(len(x))
        run = self._replay if self._is_replayed(x) else self._run
        with self._no_autocast():
            rows = self.table(t, class_labels)
            out = self._run_groups(run, x, rows, size) if size else run(x, rows)
        return out.squeeze(2) if self.config.dims == 1 else out


def unfused(network: nn.Module) -> list[str]:
    """The names of the layers that run as PyTorch's ordinary operators."""
    return [name for name, m in network.named_modules() if not getattr(m, "is_fused", True)]


def convolutions(dtype: torch.dtype) -> str:
    """Whose convolutions a network has that is prepared for a CPU."""
    if ops.is_conv2d_fastest(dtype):
        return f"own ({backends.conv_kernels(dtype)})"
    if dtype == torch.bfloat16 and ops.has_conv2d(dtype):
        return f"oneDNN's; at the network's ends own ({backends.conv_kernels(dtype)})"
    return "oneDNN's"


def _layers(device: torch.device, dtype: torch.dtype, backend: str) -> Layers | None:
    """What a prepared network is made of there; None where it cannot be."""
    if device.type == "cpu":
        return CpuLayers(dtype) if dtype in fused.DTYPES else None
    name = backends.resolve_backend(device, backend)[0]
    if name == "reference" or dtype not in fused_cuda.DTYPES or backends.triton_obstacle():
        return None
    return GpuLayers(device, dtype, name)


def prepare(
    unet: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    fused: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """A copy of the network for sampling: on `device`, in `dtype`, without gradients.

    On a CPU the process keeps what layers free, see `device.keep_freed_memory`.

    A `UNet` becomes a `FusedUNet`, unless `fused` is False: on a CPU in float32 or bfloat16, on a
    GPU in float16 too, with the fused kernels of `backend` (see `backend.resolve_backend`; Triton
    has those of a network also with "cuda"). With the backend "reference", a GPU's stays a `UNet`.
    """
    device = with_index(device)
    if device.type == "cpu":
        keep_freed_memory()
    # A subclass may compute another function.
    layers = _layers(device, dtype, backend) if fused and type(unet) is UNet else None
    if layers is not None:
        in_place = all(p.device == device for p in unet.parameters())
        network = FusedUNet(unet if in_place else copy.deepcopy(unet).to(device), layers)
        give_back_freed_memory()  # of weights on their way to being packed
        return network
    network = copy.deepcopy(unet).to(device, dtype).eval().requires_grad_(False)
    if any(p.ndim == 4 for p in network.parameters()):
        network.to(memory_format=memory_format(device, dtype, 4))
    return network
