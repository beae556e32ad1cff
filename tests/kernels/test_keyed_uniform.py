"""keyed_uniform: Random123's vectors, the formula written out, the same bits everywhere."""

import pytest
import torch

from fastssl import functional as F
from fastssl.kernels.common.philox import MASK32, derive_key, keyed_words, philox, philox_tensor
from tests.kernels.util import compiled_backends, device_of

BACKENDS = compiled_backends("keyed_uniform")
ALL = ["reference", *BACKENDS]
# Counter, key and words of Philox4x32-10, from Random123's kat_vectors.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SAMPLES = torch.tensor([0, 1, 2, 77, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**62 + 3, 2**63 - 1])
# num, seed, epoch, view, stream: nothing, ones, primes, ViT-B's tokens, the largest of each.
CALLS = [
    (0, 0, 0, 0, 0),
    (1, 1, 0, 0, 0),
    (7, 0, 3, 1, 2),
    (196, 42, 5, 0, 0),
    (1031, 2**63 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
]


def run(backend, samples=SAMPLES, num=196, **key):
    out = F.keyed_uniform(samples.to(device_of(backend)), num, backend=backend, **key)
    return out.cpu()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert philox(counter, key) == words
    tensors = philox_tensor(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in tensors) == words


def test_samples_are_split_into_halves():
    """What every backend must equal is itself equal to Philox in Python integers."""
    key = derive_key(2**40 + 7, 3, 1, 2)
    assert key == philox((3, 1, 2, 0), (7, 2**8))[:2]
    words = keyed_words(SAMPLES, torch.arange(3), key)
    for b, sample in enumerate(SAMPLES.tolist()):
        for q in range(3):
            expected = philox((q, 0, sample & MASK32, sample >> 32), key)
            assert tuple(words[b, q].tolist()) == expected


@pytest.mark.parametrize("backend", ALL)
def test_formula_written_out(backend):
    out = run(backend, num=6, seed=9, epoch=4, view=3, stream=1)
    key = philox((4, 3, 1, 0), (9, 0))[:2]
    for b, sample in enumerate(SAMPLES.tolist()):
        for p in range(6):
            word = philox((p // 4, 0, sample & MASK32, sample >> 32), key)[p % 4]
            assert out[b, p].item() == (word >> 8) / 2**24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_same_bits_on_every_backend(call, backend, poisoned_memory):
    num, seed, epoch, view, stream = call
    key = {"seed": seed, "epoch": epoch, "view": view, "stream": stream}
    out = run(backend, num=num, **key)
    assert out.dtype == torch.float32 and out.shape == (len(SAMPLES), num)
    assert torch.equal(out, run("reference", num=num, **key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_samples_of_few_numbers(backend):
    """As when a data set is shuffled; long enough for several threads and programs."""
    samples = torch.arange(10**9, 10**9 + 5003)
    assert torch.equal(run(backend, samples, 2, seed=1), run("reference", samples, 2, seed=1))


@pytest.mark.parametrize("backend", ALL)
def test_row_depends_on_its_sample_only(backend):
    out = run(backend, seed=3)
    order = torch.randperm(len(SAMPLES))
    assert torch.equal(run(backend, SAMPLES[order], seed=3), out[order])
    parts = [run(backend, part, seed=3) for part in SAMPLES.split((1, 4, 5))]
    assert torch.equal(torch.cat(parts), out)
    assert torch.equal(run(backend, SAMPLES[:0], seed=3), out[:0])
    # A shorter row is the beginning of a longer one; a strided tensor counts by its values.
    assert torch.equal(run(backend, num=5, seed=3), out[:, :5])
    assert torch.equal(run(backend, SAMPLES.repeat_interleave(2)[::2], seed=3), out)


@pytest.mark.parametrize("backend", ALL)
def test_every_part_of_the_key_counts(backend):
    keys = [{"seed": 0}, {"seed": 1}, {"seed": 2**32}]
    keys += [{"seed": 0, name: 1} for name in ("epoch", "view", "stream")]
    rows = torch.cat([run(backend, num=64, **key) for key in keys])
    # Independent rows of 64 numbers share none of their first four but by a chance of 2^-20.
    assert rows[:, :4].unique(dim=0).shape[0] == len(keys) * len(SAMPLES)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.6


def test_streams_of_functional_differ():
    streams = {F.STREAM_MASK, F.STREAM_CROP, F.STREAM_SHUFFLE, F.STREAM_EVAL}
    assert streams == {0, 1, 2, 3}


@pytest.mark.parametrize("backend", ALL)
def test_uniform(backend):
    out = run(backend, torch.arange(256), 256, seed=5)
    assert 0 <= out.min() and out.max() < 1
    counts = torch.histc(out, bins=64, min=0, max=1)
    expected = out.numel() / 64
    # Chi-square of 63 degrees of freedom: mean 63, deviation 11.2.
    assert 25 < ((counts - expected) ** 2 / expected).sum() < 120
    neighbours = torch.stack([out[:, :-1].flatten(), out[:, 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.02
    assert abs(out.mean() - 0.5) < 0.005


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    samples = SAMPLES.to(device_of(backend))
    torch.library.opcheck(torch.ops.fastssl.keyed_uniform, (samples, 7, 1, 2, 3, 4, backend))


@pytest.mark.parametrize("backend", ALL)
def test_compiles_without_a_graph_break(backend):
    """Also with an epoch that changes between calls."""

    def call(samples, epoch):
        return F.keyed_uniform(samples, 9, seed=2**40 + 1, epoch=epoch, backend=backend)

    compiled = torch.compile(call, fullgraph=True)
    samples = SAMPLES.to(device_of(backend))
    for epoch in range(3):
        assert torch.equal(compiled(samples, epoch), call(samples, epoch))


BAD = {
    "samples must be int64, got int32": {"samples": torch.zeros(3, dtype=torch.int32)},
    "samples must have 1 dimensions, got shape (3, 1)": {
        "samples": torch.zeros(3, 1, dtype=torch.int64)
    },
    "samples must be a Tensor, got int": {"samples": 3},
    "num must be at least 0, got -1": {"num": -1},
    "num must be an int, got float": {"num": 2.0},
    f"seed must be at least 0 and at most {2**63 - 1}, got -1": {"seed": -1},
    f"seed must be at least 0 and at most {2**63 - 1}, got {2**63}": {"seed": 2**63},
    f"epoch must be at least 0 and at most {2**32 - 1}, got {2**32}": {"epoch": 2**32},
    "view must be an int, got Tensor": {"view": torch.zeros(3)},
    "stream must be at least 0": {"stream": -1},
    "backend must be one of cpp, triton, reference": {"backend": "magic"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    good = {"samples": SAMPLES, "num": 3, "seed": 0}
    with pytest.raises((TypeError, ValueError)) as error:
        F.keyed_uniform(**{**good, **BAD[message]})
    assert message in str(error.value)
