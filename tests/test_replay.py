"""What a recording has of a function's operators, and what cannot be recorded is called."""

import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ddpm_fast import backend, replay
from ddpm_fast.replay import Recordings

pytestmark = pytest.mark.usefixtures("extension")


TARGET = torch.zeros(2, 3, 3)
CONSTANT = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(2))


def written(x, y):
    made = x.new_empty([2, 3, 6])
    made[..., :3] = x
    made[..., 3:] = y
    return torch.bmm(made[..., 1:4], y)


def released(x, y):
    """What is not needed any more is gone while the rest is recorded."""
    made = torch.bmm(x, y)
    last, gone = torch.bmm(made, y), weakref.ref(made)
    del made
    assert gone() is None
    return last


def attention(x, y):
    return F.scaled_dot_product_attention(x[None], y[None], y[None])[0]


FUNCTIONS = {
    "views": lambda x, y: torch.bmm(x[:, 1:].permute(0, 2, 1), y.split([1, 2], 1)[1])[:, ::2],
    "a view of an input": lambda x, y: x[1:, None],
    "an empty view": lambda x, y: torch.bmm(x[:, :0], y),
    "one that is written into": written,
    "what is released": released,
    "the first of two results": attention,
    "constants": lambda x, y: torch.bmm(x, CONSTANT[:, 1:4].expand(2, 3, 4)),
}


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given):
        self.calls += 1
        return self.function(*given)


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_the_second_call_is_recorded_and_then_replayed(name):
    function, recordings = Counted(FUNCTIONS[name]), Recordings()
    for seed in range(4):
        got, want = recordings(function, *pair(seed)), FUNCTIONS[name](*pair(seed))
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert function.calls == 2


def unseen(x, y):
    """Does something that no operator does."""
    made = torch.bmm(x, y)
    made.numpy()[0] += 1
    return made


def both(x, y):
    flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = flash_attention(x[None], y[None], y[None])
    return torch.bmm(out[0], sums[0, :, :, None].expand(2, 3, 3))


OTHERS = {
    "an unknown operator": lambda x, y: torch.sin(x),
    "a number": lambda x, y: torch.bmm(x, y)[:, : 1 + int(x[0, 0, 0].item() > 0)],
    "numpy": unseen,
    "a constant": lambda x, y: CONSTANT,
    "a constant written into": lambda x, y: torch.bmm(x, TARGET.copy_(y)),
    "the second of two results": both,
    "another dtype": lambda x, y: torch.bmm(x, y.view(torch.int32).float()),
    "another layout": lambda x, y: torch.bmm(x, y.to_sparse().to_dense()),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_cannot_be_recorded_is_called(name):
    function, recordings = Counted(OTHERS[name]), Recordings()
    for seed in range(4):
        assert torch.equal(recordings(function, *pair(seed)), OTHERS[name](*pair(seed)))
    assert function.calls == 4


@torch.no_grad()
def test_recording_sets_no_flag_of_the_whole_process():
    """Which threads that record at once could leave set for good."""
    recordings, before, seen = Recordings(), is_in_torch_dispatch_mode(), []

    def function(x, y):
        seen.append((is_in_torch_dispatch_mode(), torch._C._len_torch_dispatch_stack()))
        return torch.bmm(x, y)

    for _ in range(3):
        recordings(function, *pair())
    assert seen == [(before, 0), (before, 1)]


@torch.no_grad()
def test_inputs_that_share_memory_are_not_recorded():
    """Others need not."""
    function, recordings = Counted(torch.bmm), Recordings()
    for x, y in [pair()[:1] * 2] * 3 + [pair(1)] * 3:
        assert torch.equal(recordings(function, x, y), torch.bmm(x, y))
    assert function.calls == 6


@torch.no_grad()
def test_the_forms_that_were_not_used_for_longest_go(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    function, recordings = Counted(torch.bmm), Recordings()

    def calls(n, times=1):
        before = function.calls
        for _ in range(times):
            x = torch.randn(n, 3, 3)
            assert torch.equal(recordings(function, x, x + 1), torch.bmm(x, x + 1))
        return function.calls - before

    assert [calls(1, 3), calls(2, 3), calls(1), calls(3, 3)] == [2, 2, 0, 2]
    assert [calls(1), calls(3), calls(2)] == [0, 0, 1]


@torch.no_grad()
def test_what_takes_long_is_not_recorded(monkeypatch):
    """But what takes long at first, as what libraries prepare does, is recorded later."""
    function, recordings = Counted(torch.bmm), Recordings()
    for longest, calls in ((0, 4), (1e9, 6)):
        monkeypatch.setattr(replay, "LONGEST", longest)
        for _ in range(4):
            assert torch.equal(recordings(function, *pair()), torch.bmm(*pair()))
        assert function.calls == calls


@torch.no_grad()
def test_an_interrupted_recording_is_made_the_next_time():
    recordings = Recordings()

    def interrupted(x, y):
        raise KeyboardInterrupt

    recordings(torch.bmm, *pair())
    with pytest.raises(KeyboardInterrupt):
        recordings(interrupted, *pair())
    function = Counted(torch.bmm)
    for _ in range(3):
        assert torch.equal(recordings(function, *pair()), torch.bmm(*pair()))
    assert function.calls == 1


@torch.no_grad()
def test_one_may_be_called_inside_another():
    inner, outer = Recordings(), Recordings()
    for _ in range(4):
        got = outer(lambda x, y: torch.bmm(inner(torch.bmm, x, y), y), *pair())
        assert torch.equal(got, torch.bmm(torch.bmm(*pair()), pair()[1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_inference_mode_made_is_recorded(mode):
    with torch.inference_mode():
        x, y = pair()
        constant = CONSTANT.clone()

    def function(x, y):
        constants = constant[None, :, :3, :3].expand(1, 2, 3, 3)
        return F.scaled_dot_product_attention(x[None].half().float(), y[None], constants)

    counted, recordings = Counted(function), Recordings()
    with mode():
        for _ in range(4):
            assert torch.equal(recordings(counted, x, y), function(x, y))
    assert counted.calls == 2


@torch.no_grad()
def test_a_replay_that_fails_leaves_it_to_the_function():
    function, recordings = Counted(torch.bmm), Recordings()
    for _ in range(3):
        recordings(function, *pair())
    for form in recordings._made:
        recordings._made[form] = torch.zeros(1)  # is none
    assert torch.equal(recordings(function, *pair()), torch.bmm(*pair())) and function.calls == 3


def told(code):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr[-2000:]


def test_freeing_one_may_free_another():
    code = """
import torch, weakref
from ddpm_fast.replay import Recordings
def made(weight):
    recordings = Recordings()
    with torch.no_grad():
        for _ in range(3):
            recordings(lambda x: torch.bmm(x, weight), torch.zeros(1, 2, 2))
    return recordings
weight = torch.zeros(1, 2, 2)
held = [made(torch.ones(1, 2, 2))]
weakref.finalize(weight, held.clear)
recordings = made(weight)
del weight
recordings._made.clear()
print("freed", held)
"""
    assert told(code) == "freed []\n"


def test_dropping_one_may_use_the_others():
    code = """
import torch, weakref
from ddpm_fast import replay
replay.MOST = 1
recordings = replay.Recordings()
def used(n, weight):
    with torch.no_grad():
        for _ in range(3):
            recordings(lambda x: torch.bmm(x, weight), torch.zeros(1, n, 2))
weight = torch.zeros(1, 2, 2)
weakref.finalize(weight, lambda: (used(3, torch.ones(1, 2, 2)), print("used")))
used(1, weight)
del weight
used(2, torch.ones(1, 2, 2))
"""
    assert told(code) == "used\n"


def test_it_takes_no_more_memory_than_the_function():
    """Neither while it is recorded nor in a replay; but what the allocator makes of it."""
    code = """
import torch
from ddpm_fast import replay
replay.LONGEST = 1e9
weight = torch.eye(16)[None]
def chain(x):
    for _ in range(100):
        x = torch.bmm(x, weight)  # 4 MiB each
    return x
def highest():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
with torch.no_grad():
    torch.set_num_threads(1)
    x, recordings = torch.ones(1, 1 << 16, 16), replay.Recordings()
    chain(x), chain(x)
    before = highest()
    for _ in range(4):
        recordings(chain, x)
    print(highest() - before < 120, [type(m).__name__ for m in recordings._made.values()])
"""
    assert told(code) == "True ['Tensor']\n"


def record(code, constants=()):
    return torch.ops.ddpm_fast.record(code, list(constants), list(pair()))


@pytest.fixture
def product():
    """The numbers of bmm(x, y), and what they make."""
    number = backend.extension.replay_operators().index("aten::bmm")
    return [1, 1, number, 1, 0, 1, 1, 2, 2, 0, 1, 2]


def test_a_recording_takes_only_what_it_was_made_for(product):
    made, (x, y) = record(product), pair()
    play = torch.ops.ddpm_fast.replay
    assert torch.equal(play(made, [x, y]), torch.bmm(x, y))
    with pytest.raises(RuntimeError, match="takes 2 tensors, but it was given 1"):
        play(made, [x])
    for other in (x[:1], x.double(), x.mT, x[0]):
        with pytest.raises(RuntimeError, match=r"input 1 of this recording, .*, is not as it was"):
            play(made, [x, other])
    for no_recording in (made.clone(), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="this tensor is no recording"):
            play(no_recording, [x, y])


def test_numbers_that_are_no_recording_are_refused(product):
    """Nothing reads beyond what is there."""
    for length in range(len(product)):
        with pytest.raises(RuntimeError, match=r"ddpm_fast: this recording (is cut|has the num)"):
            record(product[:length])
    for place in range(len(product)):
        for value in (-1, 1 << 40):
            wrong = [*product[:place], value, *product[place + 1 :]]
            with pytest.raises(RuntimeError, match="ddpm_fast: this recording "):
                torch.ops.ddpm_fast.replay(record(wrong), list(pair()))
    before = [*product]
    before[5:7] = [1, 2]  # its own result
    with pytest.raises(RuntimeError, match="reads a tensor before it is made"):
        torch.ops.ddpm_fast.replay(record(before), list(pair()))
    number = [*product]
    number[5:7] = [3, 1]
    with pytest.raises(RuntimeError, match="was given no tensor"):
        torch.ops.ddpm_fast.replay(record(number), list(pair()))
