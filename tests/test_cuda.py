"""Decoding by CUDA graphs (speed/cuda.py), and the table that tests/cuda.sh prints.

    python -m pytest tests/test_cuda.py
    python -m pytest -m slow tests/test_cuda.py     # more rows of the table, with tiny shapes on the CPU

Without a CUDA device graphs are imitated: what a step does is recorded, and repeated as it was recorded. So a
step that read anything from the host, or waited for the device, would fail here, too.
"""
import copy
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_rows
from conditioners import Conditions
from constants import ROOT
from cuda_rows import difference
from models import OPTIONS, conditions_of, make
from sample import Settings, condition_passes, generate, stream_window
from speed import cuda, optimize_for_cuda

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WAITING = torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default
TEXTS, T = ["slow flute and a drum", None, "organ"], 12


class Recorder(TorchDispatchMode):
    """Records the operations inside `with`; replay() repeats them on the same tensors, as a graph would."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in WAITING, "the host waits for a number"
        result = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            pairs = zip(result, again) if isinstance(result, tuple) else [(result, again)]
            for recorded, new in pairs:
                if isinstance(new, torch.Tensor) and new.data_ptr() != recorded.data_ptr():
                    recorded.copy_(new)


def imitation(step, device):
    """As cuda.record; but here recording a step takes it, so it is the one before that is taken again."""
    buffers, _ = step.args
    for counter in (buffers.number, buffers.place, buffers.position):
        counter -= 1
    with Recorder() as graph:
        step()
    return graph


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request, monkeypatch):
    monkeypatch.setattr(cuda, "BUCKET", 8)
    if request.param == "cpu":
        monkeypatch.setattr(cuda, "record", imitation)
    return torch.device(request.param)


def models(device, **options):
    """A model on the device as lm.py has it, and one that decodes by graphs."""
    lm = make(**options).to(device)
    return lm, optimize_for_cuda(copy.deepcopy(lm))


def passes_of(lm, texts=TEXTS, two_step=False):
    return condition_passes(lm, conditions_of(lm, texts, [1, None, 2][:len(texts)]), T, 3.0, two_step)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_those_of_the_plain_way(device, options):
    """Over several buckets; texts of several lengths, so that a prefix or a condition has padding."""
    lm, fast = models(device, **options)
    passes = passes_of(lm, two_step=options == {})
    expected = generate(lm, passes, T, [0, 1, 2], top_k=5)
    assert torch.equal(generate(fast, passes, T, [0, 1, 2], top_k=5), expected)
    for buffers in fast.spare:
        assert len(buffers.graphs) > 1 and None not in buffers.graphs.values()


def test_logits_are_near_those_of_all_columns_at_once(device):
    lm, fast = models(device, positional_embedding="sin_rope", text="cross")
    codes = torch.randint(lm.config.card, (2, 4, T), device=device)
    sequence, _ = lm.pattern.build(codes, lm.special)
    S = sequence.shape[-1]
    with torch.no_grad():
        conditions = passes_of(lm, TEXTS[:1])[0]
        expected = lm(sequence, conditions)
        cache = fast.new_cache(2, S + conditions.prefix_length)
        columns = [fast(sequence[..., s:s + 1], conditions, cache) for s in range(S)]
    torch.testing.assert_close(torch.cat(columns, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(text="cross"), dict(text="interpolate")], ids=str)
def test_graphs_serve_the_next_generation(device, options):
    """Other conditions, of the same shapes and longer ones, and whatever has been left in the cache."""
    lm, fast = models(device, **options)
    generate(fast, passes_of(lm, ["organ", None, "flute"]), T, [3, 4, 5])
    buffers, = fast.spare
    graphs = dict(buffers.graphs)
    for tensor in (buffers.keys, buffers.values, buffers.logits):
        tensor.fill_(float("nan"))
    for texts in (["drums", "flute", None], ["longer", "flute", None]):
        passes = passes_of(lm, texts)
        expected = generate(lm, passes, T, [0, 1, 2], top_k=5)
        assert torch.equal(generate(fast, passes, T, [0, 1, 2], top_k=5), expected)
        if texts[0] == "drums":     # as many letters as before
            assert fast.spare == [buffers] and buffers.graphs == graphs


def test_two_generations_at_once_do_not_meet(device):
    lm, fast = models(device)
    passes, nothing = passes_of(lm, TEXTS[:1]), torch.empty(1, 4, 0, dtype=torch.long, device=device)
    expected = [generate(lm, passes, T, [seed]) for seed in (0, 1)]
    streams = [stream_window(fast, passes, T, [seed], nothing, Settings(top_k=0)) for seed in (0, 1)]
    pieces = zip(*zip(*streams))
    for stream, codes in zip(pieces, expected):
        assert torch.equal(torch.cat(stream, -1), codes)


def test_what_cannot_be_recorded_runs_as_it_is(capsys):
    """A step that waits for the device; without one there is nothing to record with."""
    assert cuda.record(lambda: torch.ones(1, device="cuda").item(), torch.device("cuda")) is None
    assert capsys.readouterr().err.count("\n") == 1


# --- kernels of Triton ------------------------------------------------------------------------------------

@pytest.fixture
def triton_device():
    """Where speed/cuda_kernels.py can run: without a GPU Triton can interpret it."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and no TRITON_INTERPRET=1")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_kernels_of_triton_compute_what_lm_does(triton_device, dtype, bound, rows, monkeypatch):
    """Behind a prefix with padding, in sizes that are no powers of two, over two buckets and two chunks."""
    monkeypatch.setattr(cuda, "BUCKET", 32)
    monkeypatch.setattr(importlib.import_module("speed.cuda_kernels"), "PROGRAMS", 16)
    lm = make(dim=96, num_heads=3, num_layers=2).to(triton_device, dtype)
    fast = optimize_for_cuda(copy.deepcopy(lm))
    fast.kernels = cuda.kernels_for(fast)
    prefix = torch.randn(rows, 61, 96).to(lm.emb.weight)
    lengths = torch.tensor([61, 20, 61, 1][:rows])[:, None]
    mask = (torch.arange(61) < lengths).to(triton_device)
    conditions = Conditions(prefix=prefix, prefix_mask=mask)
    sequence = torch.randint(lm.config.card, (rows, 4, 5)).to(triton_device)
    with torch.no_grad():
        cache, fast_cache = (model.new_cache(rows, 66) for model in (lm, fast))
        for column in sequence.split(1, 2):
            expected = lm(column, conditions, cache).cpu()
            assert difference(fast(column, conditions, fast_cache), expected) < bound
    assert fast.kernels


@pytest.mark.parametrize("options", [dict(text="cross"), dict(qk_layer_norm=True),
                                     dict(positional_embedding="sin_rope")], ids=str)
def test_other_layers_do_without_triton(triton_device, options):
    assert cuda.kernels_for(make(**options)) is None


def test_kernels_that_fail_are_left_out(device, capsys):
    lm, fast = models(device)

    def fail(*_):
        raise ValueError("no compiler\nhere")
    fast.kernels = fail
    passes = passes_of(lm)
    expected = generate(lm, passes, T, [0, 1, 2], top_k=5)
    assert torch.equal(generate(fast, passes, T, [0, 1, 2], top_k=5), expected)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ValueError: no compiler)" in error and fast.kernels is None


# --- tests/cuda.sh ----------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$*" in
    -c*) exit 1 ;;
    *heading*) echo "| what | measured |" ;;
    *codec*) echo "| codec | 3 s/s |" ;;
    *parallel*) echo "before"; echo "Traceback" >&2; echo "ValueError: a | b" >&2; exit 1 ;;
    *) exec sleep 60 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """tests/cuda.sh with a stand-in for Python."""
    if sys.platform != "linux":
        pytest.skip("needs bash and timeout")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*argv):
        command = ["bash", ROOT / "tests" / "cuda.sh", *argv]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done, [line for line in done.stdout.splitlines() if line.startswith("|")]
    return run


def test_script_goes_on_behind_a_row_that_fails(script):
    done, rows = script("--device", "cpu", "parallel", "codec")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert rows[1:] == ["| codec | 3 s/s |", "| parallel | FAILED (1): ValueError: a / b | | |"]


def test_script_ends_in_time(script):
    """A row that hangs takes what time there is; the one behind it, which is no row at all, has none left."""
    done, rows = script("--device", "cpu", "--seconds", "2", "sample_tiny", "none")
    assert done.returncode == 1 and len(rows) == 3
    assert re.match(r"\| sample_tiny \| FAILED \(124\): its [12] s are over", rows[1])
    assert rows[2] == "| none | not run: the 2 s are over | | |"


def test_script_without_a_device(script):
    done, rows = script()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "not run" in done.stderr


QUICK = ("heading", "decode_1.5B")
# tests would run this test, parallel leaves joined processes, and a CPU compiles layers for minutes
OTHERS = ("tests", "parallel", "compile_decode", "compile_train")
SLOW = [name for name in cuda_rows.ROWS if name not in QUICK + OTHERS]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_rows_of_the_script(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_rows.py", name, "--device", "cpu", "--quick"])
    cuda_rows.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows and all(row.count("|") == 5 for row in rows)


def test_script_row_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cuda_rows.py", "codec", "--device", "cpu", "--quick"])
    monkeypatch.setitem(cuda_rows.ROWS, "codec", lambda args: cuda_rows.check(False, "codes differ"))
    with pytest.raises(SystemExit, match="codes differ"):
        cuda_rows.main()
