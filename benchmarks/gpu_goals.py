"""What is wanted of a GPU, and how much of it bench_captured.py found."""

from __future__ import annotations

from loop_engines import CAPTURED, COMPILED, EAGER, PEER, SLOW_TO_MAKE

# For an H100 or H200: (model, batch, what it is compared with, times as fast).
WANTED = [("cifar10", "1", f"{PEER} bfloat16", 5), ("mnist", "64", f"{PEER} bfloat16", 10)]
WANTED += [("cifar10", "1", f"{PEER} bfloat16, compiled {mode}", 1.5) for mode in COMPILED]
WANTED += [("cifar10", n, f"{PEER} bfloat16, compiled {COMPILED[-1]}", 1.3) for n in ("64", "256")]
STEP_MS, SHARE_OF_PEAK = 0.6, 0.45


def goals(figures: dict[str, dict]) -> dict[str, str]:
    """What is wanted of an H100 or H200, as far as it was measured."""
    said = {}
    for name, n, peer, wanted in WANTED:
        cell = figures.get(name, {}).get(n, {})
        if peer in cell and CAPTURED in cell:
            ratio = cell[peer]["ms_per_step"] / cell[CAPTURED]["ms_per_step"]
            said[f"{name}, batch {n}, against {peer}"] = f"{ratio:.2f} times (wanted: {wanted})"
    cells = figures.get("cifar10", {})
    one = cells.get("1", {}).get(CAPTURED, {})
    if one:
        ms = one["ms_per_step"]
        said["cifar10, batch 1, a step"] = f"{ms:.3f} ms (wanted: at most {STEP_MS})"
    if "idle" in one:
        said["cifar10, batch 1, GPU idle"] = f"{100 * one['idle']:.1f} % (wanted: under 3 %)"
    for n in cells:
        share = cells[n].get(CAPTURED, {}).get("share_of_peak")
        if share and int(n) >= 64:
            wanted = f"(wanted: {100 * SHARE_OF_PEAK:.0f} %)"
            said[f"cifar10, batch {n}, of the matrix peak"] = f"{100 * share:.1f} % {wanted}"
    for what, others in (("our eager loop", [EAGER]), ("what is compiled", list(SLOW_TO_MAKE))):
        said |= _slowest(figures, what, others)
    return said


def _slowest(figures: dict[str, dict], what: str, others: list[str]) -> dict[str, str]:
    """Where the captured loop gains least on the best of others."""
    ratios = {
        f"{name}, batch {n}": min(cell[o]["ms_per_step"] for o in others if o in cell)
        / cell[CAPTURED]["ms_per_step"]
        for name, cells in figures.items()
        for n, cell in cells.items()
        if CAPTURED in cell and any(o in cell for o in others)
    }
    if not ratios:
        return {}
    place = min(ratios, key=ratios.get)
    return {
        f"captured against {what}": f"{ratios[place]:.2f} times at least, at {place} (wanted: 1)"
    }
