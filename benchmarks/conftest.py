"""What several benchmarks share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, torch.get_num_threads()], ids=lambda n: f"{n}_threads")
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
