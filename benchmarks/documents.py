"""What the benchmarks left in results/: read without torch, and in words where it was measured."""

from __future__ import annotations

import json
from pathlib import Path


def read(name: str) -> dict | None:
    path = Path(__file__).parent / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(document: dict) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items())
    about = [document.get("cpu_family", ""), *document["instruction_sets"]]  # older files have none
    device = f"{document['device']} ({', '.join(filter(None, about))})"
    return f"{device}, {document['threads']} threads, {versions}, {document['date']}"
