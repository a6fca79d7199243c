"""The README's tables of the networks: one evaluation beside the peers', and how exact it is."""

from __future__ import annotations

from documents import read, where

TITLES = {"cifar10": "Ho et al.'s CIFAR-10 U-Net", "mnist": "The shipped digit model"}


def peers(model: str) -> str:
    """Milliseconds of one evaluation, and of the others' how many times ours in bfloat16."""
    document = read(f"peers_{model}")
    if document is None:
        return ""
    memory = read("peers_memory")
    peaks = memory["figures"]["mib"].get(model, {}) if memory else {}
    headings = [*(f"batch {b}" for b in document["figures"]["batches"]), "to prepare, s", "error"]
    if peaks:
        headings.append(f"peak MiB, batch {memory['figures']['batch_size']}")
    batches, engines = document["figures"]["batches"], document["figures"]["engines"]
    absent = "".join(f" Left out: {name}." for name in document["figures"]["absent"])
    lines = [
        f"{TITLES[model]}, one evaluation, the same weights, milliseconds: {where(document)}. In "
        f"brackets, how many times as long as ours in bfloat16; for ours, the share of the speed "
        f"of one packed convolution of oneDNN's (3x3, 256 to 256 channels, 16x16, batch 16)."
        f"{absent}",
        "",
        f"| | {' | '.join(headings)} |",
        "|---" * (len(headings) + 1) + "|",
    ]
    for name, engine in engines.items():
        cells = []
        for row in batches.values():
            beside = f"{row[name]['median'] / row['ddpm_fast bfloat16']['median']:.2f}x"
            if name.startswith("ddpm_fast"):
                beside = f"{100 * row[name]['share']:.0f} %"
            cells.append(f"{row[name]['median']:.1f} ({beside})")
        cells += [f"{engine['prepared_seconds']:.1f}", f"{engine['error']:.1e}"]
        if peaks:
            cells.append(f"{peaks[name]:.0f}" if name in peaks else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def precision() -> str:
    document = read("precision")
    if document is None:
        return ""
    figures = document["figures"]
    rows = [
        f"{name} {row['all']:.0f} dB (worst {row['worst image']:.0f})"
        for name, row in figures["psnr"].items()
    ]
    return (
        f"{figures['num_samples']} digits in {figures['steps']} steps of the same noise, PSNR "
        f"against the float32 network layer by layer: {', '.join(rows)}. {where(document)}.\n"
    )


def digits() -> str:
    """The shipped model's in either dtype, from the same noise, as judge_digits.py finds them."""
    found = {dtype: read(f"digits_{dtype}") for dtype in ("float32", "bfloat16")}
    if None in found.values():
        return ""
    rows = [
        f"{dtype} {100 * f['recognised']:.1f} % recognised, Frechet distance {f['frechet']:.2f}"
        for dtype, f in ((dtype, document["figures"]) for dtype, document in found.items())
    ]
    document = found["float32"]
    figures = document["figures"]
    return (
        f"{figures['num_frechet']} digits in {figures['steps']} steps of the same noise, as a "
        f"classifier of MNIST judges them: {'; '.join(rows)}. {where(document)}.\n"
    )


OWN, THEIRS = "ddpm_fast float32", "diffusers float32 channels_last"
LEVELS = {"avx512": "ONEDNN_MAX_CPU_ISA=AVX512_CORE", "avx2": "ONEDNN_MAX_CPU_ISA=AVX2"}


def lower_levels() -> str:
    """float32 against diffusers, of CPUs that have no more than a level, as this one was told."""
    lines = []
    for level, variable in LEVELS.items():
        document = read(f"peers_{level}_cifar10")
        if document is None:
            continue
        cells = []
        for batch, row in document["figures"]["batches"].items():
            own, theirs = (row[name]["median"] for name in (OWN, THEIRS))
            cells.append(f"{own:.1f} ms at batch {batch} ({theirs / own:.2f}x)")
        lines.append(f"- `{variable}`: {', '.join(cells)}. {where(document)}.")
    if not lines:
        return ""
    head = (
        f"{TITLES['cifar10']} in float32 on a CPU held to fewer instructions (for AVX2 also ours "
        f"and torch's); in brackets, how many times as long diffusers float32 channels_last takes:"
    )
    return "\n".join([head, "", *lines, ""])
