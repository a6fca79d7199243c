"""One evaluation of a U-Net by diffusers, OpenVINO and us: the same weights, alternating rounds.

    python benchmarks/peers.py [--models cifar10 mnist] [--batch-sizes 1 16 64] [--rounds 7]
    python benchmarks/peers.py --memory --batch-sizes 16

Needs the extra `peers`; OpenVINO is left out, and named, where it is not installed. Every engine
reads the same files and has the same number of threads. Milliseconds (median and quartiles),
seconds from the files until it can be called, errors against the float32 `UNet` and the share of a
convolution's speed measured in the same run go to results/peers_MODEL.json; the peak memory of a
process for each engine, at the largest batch, to results/peers_memory.json.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import results
import torch
from networks import MODELS, TIMESTEPS, flop_of, inputs
from peak_memory import peak_memory
from torch import Tensor, nn

from ddpm_fast import backend
from ddpm_fast.checkpoint import Model, load_model
from ddpm_fast.fused import is_packable
from ddpm_fast.inference import prepare

CPU = torch.device("cpu")
LAST = torch.channels_last
F32, BF16 = torch.float32, torch.bfloat16
TURN = 0.1  # seconds; a first call after another engine's finds the caches cold
Engine = Callable[[Tensor, Tensor], Callable[[], Tensor]]  # (x, t) -> one evaluation


def _unet2d(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DModel  # here, since it takes memory that others need not

    return UNet2DModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()


def _diffusers(folder: Path, dtype: torch.dtype, order: torch.memory_format) -> Engine:
    unet = _unet2d(folder, dtype).to(memory_format=order)

    def at(x: Tensor, t: Tensor) -> Callable[[], Tensor]:
        x = x.to(dtype).contiguous(memory_format=order)
        return lambda: unet(x, t).sample

    return at


class _Sample(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


def _openvino(folder: Path) -> Engine:
    import openvino

    unet, core = _Sample(_unet2d(folder, F32)), openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }

    def at(x: Tensor, t: Tensor) -> Callable[[], Tensor]:
        graph = openvino.convert_model(unet, example_input=(x, t), input=[x.shape, t.shape])
        compiled = core.compile_model(graph, "CPU", settings)
        inputs = [x.numpy(), t.numpy()]
        return lambda: torch.from_numpy(compiled(inputs)[0])

    return at


def _ours(folder: Path, dtype: torch.dtype) -> Engine:
    model = load_model(folder)
    network = prepare(model.unet, CPU, dtype)
    network.expect(range(model.schedule.num_timesteps))

    def at(x: Tensor, t: Tensor) -> Callable[[], Tensor]:
        x = x.to(network.input_dtype).contiguous(memory_format=LAST)
        return lambda: network(x, t)

    return at


@contextmanager
def _level(name: str) -> Iterator[None]:
    before = backend.cpu_level()
    backend.extension._set_cpu_level(name, unchecked=True)  # which would take time
    try:
        yield
    finally:
        backend.extension._set_cpu_level(before, unchecked=True)


def _at_level(name: str, folder: Path) -> Engine:
    """Ours as with this DDPM_FAST_CPU, beside what is the default."""
    with _level(name):
        engine = _ours(folder, BF16)

    def at(x: Tensor, t: Tensor) -> Callable[[], Tensor]:
        call = engine(x, t)

        def evaluate() -> Tensor:
            with _level(name):
                return call()

        return evaluate

    return at


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "diffusers float32": lambda folder: _diffusers(folder, F32, torch.contiguous_format),
    "diffusers float32 channels_last": lambda folder: _diffusers(folder, F32, LAST),
    "diffusers bfloat16 channels_last": lambda folder: _diffusers(folder, BF16, LAST),
    "OpenVINO bfloat16": _openvino,
    "ddpm_fast float32": lambda folder: _ours(folder, F32),
    "ddpm_fast bfloat16": lambda folder: _ours(folder, BF16),
}
if backend.is_available() and "amx" in backend.extension.cpu_levels_available():
    ENGINES["ddpm_fast bfloat16, own AMX"] = lambda folder: _at_level("amx", folder)
    ENGINES["ddpm_fast bfloat16, oneDNN's AMX"] = lambda folder: _at_level("avx512", folder)


def ceiling(dtype: torch.dtype) -> Callable[[], Tensor]:
    """oneDNN's convolution of 3x3, 256 to 256 channels, 16x16, a batch of 16, of packed weights.

    Ours needs fewer multiplications, and would not say what the machine can do.
    """
    x = torch.randn(16, 256, 16, 16).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(256, 256, 3, 3).to(dtype).contiguous(memory_format=LAST)
    bias, place = torch.randn(256).to(dtype), ([1, 1], [1, 1], [1, 1], 1)
    onednn = torch.ops.mkldnn
    packed = onednn._reorder_convolution_weight(weight, *place, list(x.shape))
    return lambda: onednn._convolution_pointwise(x, packed, bias, *place, "none", [], "")


CEILING_FLOP = 2 * 16 * 256 * 256 * 9 * 256


def seconds(call: Callable[[], Tensor], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def rounds(calls: dict[str, Callable[[], Tensor]], count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, in rounds in which each has its turn: TURN seconds, or one call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        seconds(call, 1)  # what is done once
        repeats[name] = max(1, round(TURN / seconds(call, 1)))
    for _ in range(count):
        for name, call in calls.items():
            times[name].append(1e3 * seconds(call, repeats[name]))
    figures = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        figures[name] = {"median": median, "quartiles": [low, high]}
    return figures


@contextmanager
def saved(model: Model) -> Iterator[Path]:
    """The files that every engine starts from: a folder as diffusers saves it."""
    from diffusers_peer import to_diffusers

    with tempfile.TemporaryDirectory() as folder:
        to_diffusers(model).save_pretrained(folder)
        yield Path(folder)


def peaks_of(model: Model, names: list[str], batch_size: int) -> dict[str, float]:
    """MiB that a process reaches that loads and runs one engine only."""
    peaks = {}
    with saved(model) as folder:
        x = folder / "x.pt"
        torch.save(inputs(model, batch_size), x)
        for name in names:
            command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
            command += ["--peak", folder, name, x]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            peaks[name] = float(done.stdout.splitlines()[-1])
            print(f"{name:34} {peaks[name]:9.0f} MiB", flush=True)
    return peaks


def _print_peak(folder: str, engine: str, x: str) -> None:
    call = ENGINES[engine](Path(folder))(*torch.load(x))
    call()
    call()
    print(peak_memory())


def make_engines(folder: Path, names: list[str], figures: dict) -> dict[str, Engine]:
    """Those that are installed; the seconds that each took, and the rest's names, in figures."""
    made = {}
    for name in names:
        began = time.perf_counter()
        try:
            made[name] = ENGINES[name](folder)
        except ImportError as error:
            figures["absent"].append(f"{name} ({error.name})")
            continue
        figures["engines"][name] = {"prepared_seconds": time.perf_counter() - began}
    return made


def measure(model_name: str, names: list[str], batch_sizes: list[int], count: int) -> dict:
    model = MODELS[model_name]()
    work = flop_of(model)
    figures: dict = {"flop_an_image": work, "engines": {}, "absent": [], "batches": {}}
    with saved(model) as folder:
        made = make_engines(folder, names, figures)
    x, t = inputs(model, len(TIMESTEPS))
    want = model.unet(x, t)
    for name, engine in made.items():
        began = time.perf_counter()
        call = engine(x, t)
        row = figures["engines"][name]
        row["prepared_seconds"] += time.perf_counter() - began  # OpenVINO compiles for a shape
        row["error"] = float((call().float() - want).norm() / want.norm())
    for batch_size in batch_sizes:
        calls = {name: engine(*inputs(model, batch_size)) for name, engine in made.items()}
        for dtype in filter(is_packable, (F32, BF16)):
            calls[f"ceiling {str(dtype).removeprefix('torch.')}"] = ceiling(dtype)
        few = max(3, count // 2) if batch_size > 16 else count
        row = figures["batches"][str(batch_size)] = rounds(calls, few)
        for name, taken in row.items():
            kind = "float32" if "float32" in name else "bfloat16"
            speed = CEILING_FLOP / row[f"ceiling {kind}"]["median"]
            if name in made:
                taken["share"] = work * batch_size / taken["median"] / speed
            print(f"{model_name} {batch_size:3} {name:34} {taken['median']:9.2f} ms", flush=True)
    return figures


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    p.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16, 64])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--name", default="peers", help="of the files in results/")
    p.add_argument("--memory", action="store_true", help="measure peak memory, and nothing else")
    p.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return _print_peak(*args.peak)
    if args.memory:
        largest = max(args.batch_sizes)
        figures = {m: peaks_of(MODELS[m](), args.engines, largest) for m in args.models}
        print(results.write("peers_memory", {"batch_size": largest, "mib": figures}))
        return None
    settings = (args.engines, args.batch_sizes, args.rounds)
    for model in args.models:
        print(results.write(f"{args.name}_{model}", measure(model, *settings)))
    return None


if __name__ == "__main__":
    main()
