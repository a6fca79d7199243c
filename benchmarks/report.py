"""Write the README's measured tables from benchmarks/results/*.json.

python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path

from documents import read, where
from report_networks import TITLES, digits, lower_levels, peers, precision

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- {} -->\n", "<!-- /{} -->"


def peer_diffusers() -> str:
    document = read("peer_diffusers")
    if document is None:
        return ""
    figures = document["figures"]
    lines = [
        f"{figures['num_samples']} digits, {figures['steps']} steps of DDPM, the same weights, one "
        f"run: {where(document)}.",
        "",
        "| | seconds | images/s | against diffusers float32 |",
        "|---|---|---|---|",
    ]
    for name, row in figures.items():
        if isinstance(row, dict):
            rate, ratio = row["images_per_second"], row["ratio"]
            lines.append(f"| {name} | {row['seconds']:.1f} | {rate:.2f} | {ratio:.2f}x |")
    return "\n".join(lines) + "\n"


def accelerated() -> str:
    document = read("accelerated")
    if document is None:
        return ""
    figures = document["figures"]
    lines = [
        f"diffusers' DDPMPipeline, {figures['num_samples']} digits in {figures['steps']} steps, "
        f"the same weights and the same generator, median of {figures['rounds']} rounds: "
        f"{where(document)}.",
        "",
        "| | seconds | | largest difference, grey levels of 255 | PSNR, dB |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if isinstance(row, dict):
            cells = [f"{row[key]:.3g}" if key in row else "" for key in ("grey_levels", "psnr_db")]
            cells = [f"{row['seconds']:.2f}", f"{row['ratio']:.2f}x", *cells]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sampling() -> str:
    document = read("sampling")
    if document is None:
        return ""
    lines = [
        f"Milliseconds a step of the shipped model: {where(document)}.",
        "",
        "| loop, dtype of the network | batch 1 | batch 16 | batch 64 |",
        "|---|---|---|---|",
    ]
    for name, row in document["figures"].items():
        cells = [f"{row[b]:.2f}" if b in row else "" for b in ("1", "16", "64")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _or_nothing(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def captured() -> str:
    """One line a network, batch and engine; the ratio is to the peer's eager bfloat16 loop."""
    document = read("captured")
    if document is None:
        return ""
    figures = document["figures"]
    few = f"images_per_second_{figures['steps']}"
    lines = [
        f"Sampling loops on a GPU, whose bfloat16 matrix product reaches "
        f"{figures['peak_tflops']:.0f} TFLOP/s: {where(document)}.",
        "",
        f"| network | batch | loop | ms a step | against {figures['peer']} bfloat16 "
        f"| images/s, 1000 steps | images/s, {figures['steps']} steps | launches a step | GPU idle "
        "| share of peak | prepared in s | peak MiB |",
        "|---" * 12 + "|",
    ]
    for network, batches in figures["models"].items():
        for batch, loops in sorted(batches.items(), key=lambda item: int(item[0])):
            peer = loops.get(f"{figures['peer']} bfloat16", {}).get("ms_per_step")
            for name, row in loops.items():
                ratio = f"{peer / row['ms_per_step']:.2f}x" if peer else ""
                lines.append(
                    f"| {network} | {batch} | {name} | {row['ms_per_step']:.3f} | {ratio} "
                    f"| {row['images_per_second_1000']:.2f} "
                    f"| {row[few]:.1f} | {_or_nothing('{:.1f}', row.get('launches'))} "
                    f"| {_or_nothing('{:.1%}', row.get('idle'))} | {row['share_of_peak']:.1%} "
                    f"| {row['prepared_seconds']:.1f} | {row['peak_mib']:.0f} |"
                )
    left_out = [f"{what} ({why})" for what, why in figures["left_out"].items()]
    missing = f"\nLeft out: {'; '.join(left_out)}.\n" if left_out else ""
    goals = [f"{what}: {reached}" for what, reached in figures["goals"].items()]
    reached = f"\nOf what is wanted on an H100 or H200: {'; '.join(goals)}.\n" if goals else ""
    return "\n".join(lines) + "\n" + reached + missing


OPERATORS = {
    "ops": "The operators of a step, microseconds a call (layouts: of 2^20 elements)",
    "layers": "The operators of a network's layers, and a network recorded and replayed, "
    "microseconds a call",
}


def ops(name: str) -> str:
    """One line a case: the first backend measured, then each of what it was measured beside."""
    document = read(name)
    if document is None:
        return ""
    figures = document["figures"]
    absent = figures.pop("absent_peers", [])
    missing = f" Not installed, so left out: {', '.join(absent)}." if absent else ""
    lines = [
        f"{OPERATORS[name]}, beside their peers and ceilings in the same rounds: "
        f"{where(document)}.{missing}",
        "",
        "| operator | case | backend | microseconds | beside | microseconds | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for operator, cases in figures.items():
        for case, times in cases.items():
            backends = [name for name in times if name in ("cpu", "cuda", "triton")]
            for name in backends:
                own = times[name]
                lines += [
                    f"| {operator} | {case} | {name} | {1e6 * own:.1f} | {other} "
                    f"| {1e6 * seconds:.1f} | {seconds / own:.2f} |"
                    for other, seconds in times.items()
                    if other not in backends
                ]
    return "\n".join(lines) + "\n"


def batch_sizes() -> str:
    document = read("batch_sizes")
    if document is None:
        return ""
    figures = document["figures"]
    lines = [
        f"Eight digits in {figures['steps']} steps, the largest difference in grey levels of 255: "
        f"{where(document)}. Noise and update are equal; where there is a difference, it is the "
        f"network library's choice of algorithm for the batch size.",
        "",
    ]
    rows = {k: v for k, v in figures.items() if isinstance(v, dict)}
    columns = list(next(iter(rows.values())))
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {k} | {' | '.join(str(row[c]) for c in columns)} |" for k, row in rows.items()]
    return "\n".join(lines) + "\n"


def _kills(figures: dict) -> str:
    runs = figures["there after each kill"].values()
    return (
        f"Killed {sum(map(len, runs))} times at random moments (SIGKILL), as 1 to {len(runs)} "
        f"processes, and resumed: the folder is an undisturbed run's byte for byte."
    )


def _processes(figures: dict) -> str:
    one, many = (name.removesuffix(", images/s") for name in list(figures)[:2])
    return f"{many} against {one}: {figures['processes / threads']:.2f} times the images/s."


def _throughput(figures: dict) -> str:
    ratio = figures["command / bare"]
    return f"The whole command at batch 64: {ratio:.3f} times the images/s of the sampler alone."


def _memory(figures: dict) -> str:
    few, many = (name.removesuffix(", MiB") for name in list(figures)[:2])
    return f"Largest resident memory of {many}: {figures['ratio']:.3f} times that of {few}."


def _startup(figures: dict) -> str:
    return (
        f"From the start of the command to its first step: {figures['seconds_to_first_step']:.1f} "
        f"s; {100 * figures['share_of_imports']['torch']:.0f} % of the imports are torch's."
    )


BULK = {
    "bulk_kills": _kills,
    "bulk_processes": _processes,
    "bulk_throughput": _throughput,
    "bulk_memory": _memory,
    "bulk_startup": _startup,
}


def bulk() -> str:
    """A line for each of what bulk_kills.py and bulk_speed.py measure."""
    found = {name: document for name in BULK if (document := read(name)) is not None}
    lines = [f"- {BULK[name](document['figures'])}" for name, document in found.items()]
    places = dict.fromkeys(
        f"{d['device']}, torch {d['versions']['torch']}, {d['date']}" for d in found.values()
    )
    return "\n".join(["Measured:", "", *lines, "", f"{'; '.join(places)}.", ""]) if found else ""


def fresh_machine() -> str:
    document = read("fresh_machine")
    if document is None:
        return ""
    f = document["figures"]
    return (
        f"`make sample` in a clean clone: {f['install']:.0f} s to install (from a package mirror "
        f"nearby), {f['build']:.0f} s to build, {f['sample']:.0f} s to sample; a second call "
        f"{f['again']:.0f} s. {where(document)}.\n"
    )


def main() -> None:
    tables = "\n".join(
        t
        for t in (
            *map(peers, TITLES),
            lower_levels(),
            peer_diffusers(),
            accelerated(),
            precision(),
            digits(),
            sampling(),
            captured(),
            *(ops(name) for name in OPERATORS),
            batch_sizes(),
            fresh_machine(),
        )
        if t
    )
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, measured in (("bulk", bulk()), ("measured", tables)):
        head, rest = text.split(BEGIN.format(name))
        tail = rest[rest.index(END.format(name)) :]
        text = f"{head}{BEGIN.format(name)}{measured}{tail}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
