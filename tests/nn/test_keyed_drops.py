"""Stochastic depth by keys: a sample's fate is its own, whatever it is computed with."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastssl.models import Hiera, MaskedAutoencoderHiera, VisionTransformer, XCiT
from fastssl.nn import DropPath, drop_path, keyed_drops

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2}
HIERA = {"input_size": (64, 64), "embed_dim": 8, "stages": (1, 2, 1, 1), "q_pool": 2}
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
XCIT = {"patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "cls_attn_layers": 1}
B = 16


def vit(rate: float = 0.1) -> VisionTransformer:
    return VisionTransformer(**VIT, drop_path_rate=rate)


def hiera(rate: float = 0.1) -> MaskedAutoencoderHiera:
    return MaskedAutoencoderHiera(**HIERA, **DECODER, drop_path_rate=rate)


def xcit(rate: float = 0.1) -> XCiT:
    model = XCiT(**XCIT, drop_path_rate=rate)
    # Batch statistics are of the batch.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    return model


def drop_often(model: nn.Module, monkeypatch) -> nn.Module:
    """The model with a rate at which most samples lose a branch, by values only."""
    monkeypatch.setattr(drop_path, "MAX_RATE_COMPUTED", 0.5)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.4
    return model.double()


@pytest.fixture(params=[(vit, 16), (hiera, 64), (xcit, 16)], ids=["vit", "hiera", "xcit"])
def model_and_images(request, monkeypatch):
    build, side = request.param
    torch.manual_seed(0)
    model = drop_often(build(), monkeypatch).train()
    return model, torch.randn(B, 3, side, side, dtype=torch.float64)


def run(model, images, samples=None, **key):
    samples = torch.arange(100, 100 + B) if samples is None else samples
    with keyed_drops(samples, **{"seed": 3} | key):
        return model.features(images)


def test_a_sample_has_its_drops_whatever_it_is_computed_with(model_and_images):
    model, images = model_and_images
    whole = run(model, images)
    ids = torch.arange(100, 100 + B)
    torch.manual_seed(7)  # of no consequence
    order = torch.randperm(B)
    for part in (slice(0, 5), slice(5, B), order):
        alone = run(model, images[part], ids[part])
        torch.testing.assert_close(alone, whole[part], rtol=1e-9, atol=1e-12)
    model.eval()
    assert ((run(model, images) - whole).abs().amax(1) > 1e-6).sum() > B / 2


def test_seed_epoch_view_and_sample_change_the_drops(model_and_images):
    model, images = model_and_images
    first = run(model, images)
    others = ({"seed": 4}, {"epoch": 1}, {"view": 1}, {"samples": torch.arange(B)})
    for key in others:
        assert ((run(model, images, **key) - first).abs().amax(1) > 1e-6).sum() > B / 2
    assert torch.equal(run(model, images), first)


def test_views_and_calls_of_a_sample_drop_each_on_its_own(model_and_images):
    model, images = model_and_images
    samples = torch.arange(B)
    with keyed_drops(samples, seed=3):
        two, again = model.features(torch.cat([images, images])), model.features(images)
    first, second = two.chunk(2)
    for a, b in ((first, second), (first, again), (second, again)):
        assert ((a - b).abs().amax(1) > 1e-6).sum() > B / 2
    # View after view, of half of the samples, it is the same.
    half = images[: B // 2]
    with keyed_drops(samples[: B // 2], seed=3):
        two_of_half = model.features(torch.cat([half, half]))
        again_half = model.features(half)
    expected = torch.cat([first[: B // 2], second[: B // 2]])
    torch.testing.assert_close(two_of_half, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again_half, again[: B // 2], rtol=1e-9, atol=1e-12)


def test_blocks_that_are_computed_again_drop_again_what_they_dropped(model_and_images):
    model, images = model_and_images

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with keyed_drops(torch.arange(B), seed=3):
            loss = sum(model.features(images).square().mean() for _ in range(2))
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_every_branch_is_dropped_as_often_as_the_rate_says(rate):
    path, x = DropPath(rate), torch.ones(4000, 1)
    torch.manual_seed(0)
    uniform = torch.rand(4000)
    kept = path(x, uniform)
    assert torch.equal(kept > 0, (uniform < 1 - rate).unsqueeze(1))
    torch.testing.assert_close(kept.max(), torch.tensor(1 / (1 - rate)))
    spared = path.add_branch(x, x, lambda y: y, uniform)
    number = path.num_kept(4000)
    assert torch.equal((spared > 1)[:, 0], uniform <= uniform.sort().values[number - 1])


def test_at_high_rates_a_micro_batch_keeps_its_number(monkeypatch):
    torch.manual_seed(0)
    model, images = vit(0.6).train(), torch.randn(B, 3, 16, 16)
    seen = []
    model.blocks[2].mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    first = run(model, images)
    assert seen == [round(0.4 * B)]
    assert torch.equal(run(model, images), first)
    assert not torch.equal(run(model, images, epoch=1), first)


def test_without_keys_torch_decides_as_before():
    torch.manual_seed(0)
    model, images = vit(0.1).train(), torch.randn(B, 3, 16, 16)

    def seeded(seed, samples=None):
        torch.manual_seed(seed)
        return model(images) if samples is None else run(model, images, samples)

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    # Nor do keys of another number of samples say anything.
    odd = torch.arange(B - 1)
    assert not torch.equal(seeded(1, odd), seeded(2, odd))


def test_what_drops_nothing_draws_nothing():
    samples = torch.arange(B)
    model, images = vit(0.1).train(), torch.randn(B, 3, 16, 16)
    with keyed_drops(samples, seed=3):
        first = model(images)
    with keyed_drops(samples, seed=3):
        model.eval()(images)
        vit(0.0).train()(images)
        assert torch.equal(model.train()(images), first)


@pytest.mark.parametrize("depth", range(1, 50))
def test_the_last_block_has_the_rate_itself(depth):
    model = VisionTransformer(**VIT | {"depth": depth}, drop_path_rate=0.1)
    # One unit in the last place more, and the last block would compute some samples only.
    assert all(block.drop_path.train().num_kept(B) == B for block in model.blocks)
    hiera = Hiera(**HIERA | {"stages": (1, depth)} | {"q_pool": 1}, drop_path_rate=0.1)
    assert all(block.drop_path.train().num_kept(B) == B for block in hiera.blocks)


def test_what_cannot_be_keyed_is_torchs_and_no_error():
    model = vit(0.1).train()
    with keyed_drops(torch.arange(0), seed=3):
        assert model(torch.randn(2, 3, 16, 16)).shape[0] == 2
    with keyed_drops(torch.arange(B), seed=3):
        assert model(torch.randn(0, 3, 16, 16)).shape[0] == 0

    class Own(nn.Module):
        """A block as a user may have it: it drops, and knows nothing of keys."""

        def __init__(self):
            super().__init__()
            self.drop_path = DropPath(0.1)

        def forward(self, x):
            return x + self.drop_path(x)

    with keyed_drops(torch.arange(B), seed=3):
        assert model.run_block(Own().train(), torch.randn(B, 4)).shape == (B, 4)


def test_keys_end_with_their_context():
    model, images = vit(0.1).train(), torch.randn(B, 3, 16, 16)
    with pytest.raises(KeyError), keyed_drops(torch.arange(B), seed=3):
        raise KeyError
    with keyed_drops(torch.arange(B), seed=3):
        assert drop_path.drops_of(model.blocks[2], B).shape == (B, 2)
        with (
            pytest.raises(RuntimeError, match="cannot be entered within itself"),
            keyed_drops(torch.arange(B), seed=3),
        ):
            pass
        assert drop_path.drops_of(model.blocks[2], B) is not None
    assert drop_path.drops_of(model.blocks[2], B) is None
    model(images)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_compiled_models_drop_the_same_and_are_not_compiled_for_every_epoch(by_blocks, monkeypatch):
    torch.manual_seed(0)
    model = drop_often(vit(), monkeypatch).train()
    images = torch.randn(B, 3, 16, 16, dtype=torch.float64)
    expected = [run(model, images, epoch=epoch) for epoch in range(5)]
    torch._dynamo.reset()
    counter = CompileCounter()
    if by_blocks:
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        compiled = model.features
    else:
        compiled = torch.compile(model.features, backend=counter, fullgraph=True)
    counts = []
    for epoch, value in enumerate(expected):
        with keyed_drops(torch.arange(100, 100 + B), seed=3, epoch=epoch):
            torch.testing.assert_close(compiled(images), value, rtol=1e-9, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]
    torch._dynamo.reset()
