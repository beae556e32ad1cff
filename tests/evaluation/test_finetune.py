"""fine_tune against the steps written out, and on planted problems."""

import copy
import math

import pytest
import torch
from torch import nn

from fastssl.evaluation import FineTuneOptions, fine_tune
from fastssl.optim import param_groups


class Encoder(nn.Module):
    """Two blocks and a norm, by the names that layer-wise decay goes by."""

    def __init__(self, dim=6, width=8, drop=0.0):
        super().__init__()
        self.patch_embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = self.patch_embed(x)
        for block in self.blocks:
            x = x + self.drop(block(x).relu())
        return self.norm(x)


def encoder(**kwargs):
    torch.manual_seed(3)
    return Encoder(**kwargs)


def batches(sizes, seed, spread=1.0, classes=3, dim=6):
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    result = []
    for size in sizes:
        labels = torch.randint(classes, (size,), generator=generator)
        result.append((centres[labels] + torch.randn(size, dim, generator=generator), labels))
    return result


WHAT = {"num_features": 8, "num_classes": 3}


def test_the_steps_are_those_of_torch():
    options = FineTuneOptions(
        lr=0.02, epochs=3, warmup_epochs=1, layer_decay=0.5, weight_decay=0.1, label_smoothing=0.2
    )
    train, test = batches([16, 16, 5], 0), batches([50, 50], 1)
    ours = encoder()
    got = fine_tune(ours, train, test, **WHAT, options=options)
    theirs = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 3)})
    for parameter in theirs["head"].parameters():
        nn.init.zeros_(parameter)
    groups = param_groups(theirs, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}
    optimizer = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": 0.1 if g["decay"] else 0.0} for g in groups],
        betas=(0.9, 0.999),
    )
    for step in range(9):
        images, labels = train[step % 3]
        lr = 0.02 * (step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 6)) / 2)
        for group, ours_group in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = lr * ours_group["lr_scale"]
        optimizer.zero_grad()
        logits = theirs["head"](theirs["encoder"](images))
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.2).backward()
        optimizer.step()
    for key, value in theirs["encoder"].state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    correct = sum(int((theirs["head"](theirs["encoder"](x)).argmax(1) == y).sum()) for x, y in test)
    assert 40 < correct < 97, "a case with errors in it"
    assert got == pytest.approx(correct, abs=1)


def test_separable_and_random_labels():
    options = FineTuneOptions(lr=0.01, epochs=10, warmup_epochs=1)
    far = batches([32] * 4, 0, spread=10.0), batches([100], 1, spread=10.0)
    assert fine_tune(encoder(), *far, **WHAT, options=options) == 100
    nothing = batches([32] * 4, 0, spread=0.0), batches([1000], 1, spread=0.0)
    # 1000 draws at 1 in 3: a standard deviation of 1.5 points.
    assert fine_tune(encoder(), *nothing, **WHAT, options=options) == pytest.approx(33.3, abs=6)


def test_deterministic_under_a_seed():
    train, test = batches([16] * 3, 0), batches([300], 1)
    states = []
    for seed, before in ((0, 1), (0, 2), (1, 2)):
        model = encoder(drop=0.5)
        torch.manual_seed(before)
        expected = torch.get_rng_state()
        options = FineTuneOptions(lr=0.02, epochs=2, warmup_epochs=0, seed=seed)
        fine_tune(model, train, test, **WHAT, options=options)
        assert torch.equal(torch.get_rng_state(), expected), "the generator is put back"
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_batches_without_images_change_nothing():
    options = FineTuneOptions(lr=0.02, epochs=2, warmup_epochs=0)
    train, test = batches([8, 0, 8], 0), batches([0, 50], 1)
    model = encoder()
    accuracy = fine_tune(model, train, test, **WHAT, options=options)
    assert accuracy > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # Momentum moves what learns nothing: a step is left out, not made with zeros.
    nothing = encoder()
    before = copy.deepcopy(nothing.state_dict())
    fine_tune(nothing, batches([0, 0], 0), test, **WHAT, options=options)
    assert all(torch.equal(value, before[key]) for key, value in nothing.state_dict().items())


def test_logits_that_are_not_finite_are_never_right():
    class Diverged(Encoder):
        def forward(self, x):
            return super().forward(x) * (1.0 if self.training else math.nan)

    images, _ = batches([20], 0)[0]
    test = [(images, torch.zeros(20, dtype=torch.int64))]
    options = FineTuneOptions(epochs=1, warmup_epochs=0)
    assert fine_tune(Diverged(), test, test, **WHAT, options=options) == 0


def test_batch_norm_leaves_a_single_image_out():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    options = FineTuneOptions(epochs=1, warmup_epochs=0)
    train, test = batches([8, 1], 0), batches([20], 1)
    fine_tune(model, train, test, **WHAT, options=options)
    assert model[1].num_batches_tracked == 1


def test_mode_frozen_parameters_and_data_loaders():
    model = encoder(drop=0.5).eval()
    model.patch_embed.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data = torch.utils.data.TensorDataset(*batches([40], 0)[0])
    train = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    options = FineTuneOptions(lr=0.02, epochs=2, warmup_epochs=0, dtype=torch.bfloat16)
    test = batches([50], 1)
    first = fine_tune(model, train, iter(test), **WHAT, options=options)
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("patch_embed"), key
    model.load_state_dict(before)
    torch.manual_seed(8)
    assert fine_tune(model, train, test, **WHAT, options=options) == first


def test_bad_input():
    train = batches([4], 0)
    for arguments, error, message in (
        ({"train": []}, ValueError, "train must have at least one batch, got none"),
        ({"test": []}, ValueError, "test must have at least one image, got none"),
        ({"num_classes": 1}, ValueError, "labels must be below 1, got"),
        ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
        ({"train": [(train[0][0], train[0][1][:2])]}, ValueError, r"labels must have shape \[N\]"),
        ({"test": [(train[0][0], train[0][1].float())]}, TypeError, "labels must be int64"),
    ):
        options = FineTuneOptions(epochs=1, warmup_epochs=0)
        defaults = {"train": train, "test": train, **WHAT, "options": options}
        with pytest.raises(error, match=message):
            fine_tune(encoder(), **defaults | arguments)
    for change, message in (
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 3, "warmup_epochs": 4}, "warmup_epochs must be at least 0 and at most 3"),
        ({"layer_decay": -1.0}, "layer_decay must be positive"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, 1.0)}, r"betas must be numbers in \[0, 1\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            FineTuneOptions(**change)
