"""What MAE may predict, and where its mask tokens may be (arXiv 2111.06377, table 1)."""

import pytest
import torch
from torch import nn

from fastssl.models import MaskedAutoencoderViT
from tests.methods.checks import Case, build, check_all, check_processes, make_batch

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY |= {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


class Tokenizer(nn.Module):
    """A patch's id is 0 to 6, by its mean; random in training mode."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        self.scale = nn.Parameter(torch.tensor([3.0]))

    def forward(self, images):
        mean = self.pool(images.mean(1)) * self.scale
        if self.training:
            mean = torch.randn_like(mean)
        return mean.round().long().clamp(-3, 3).add(3).flatten(1)


class Floats(nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


def case(model_args=None, **args):
    keywords = {"model": "MaskedAutoencoderViT", "model_args": TINY | (model_args or {})}
    return Case("mae", {"mask_ratio": 0.5, **args}, **keywords)


TOKENS = {"target": "tokens", "num_tokens": 7}
TOKENS |= {"tokenizer": "tests.methods.test_mae_targets:Tokenizer"}
PCA = Case(
    "mae",
    {"mask_ratio": 0.5, "target": "pca", "num_components": 5},
    model="MaskedAutoencoderViT",
    model_args=TINY,
    # The basis is that of the first micro-batch, which is smaller there.
    accumulates=False,
)
CASES = {
    "default": case(),
    "pixel": case({"norm_pix_loss": True}, target="pixel"),
    "norm_pixel": case(target="norm_pixel"),
    "pca": PCA,
    "tokens": case(**TOKENS),
    "mask_in_encoder": case({"mask_in_encoder": True}),
    "mask_in_encoder_tokens": case({"mask_in_encoder": True}, **TOKENS),
}


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", ["default", "pca", "tokens", "mask_in_encoder"])
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def patches_of(images):
    """[B, 16, 48], pixels in order (row, column, channel)."""
    rows = [images[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(4) for c in range(4)]
    return torch.stack([x.permute(0, 2, 3, 1).flatten(1) for x in rows], 1)


def components(x, number):
    """The mean and the first components, by the singular values of centred rows."""
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    basis = v[:number].T
    return x.mean(0), basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()


def errors(name, method, images, pred):
    """[B, N], the error of each patch."""
    true = patches_of(images)
    if name == "tokens":
        ids = method.target.tokenizer.eval()(images)
        return pred.exp().sum(2).log() - pred.gather(2, ids[..., None])[..., 0]
    if name == "norm_pixel":
        mean = true.mean(2, keepdim=True)
        var = (true - mean).square().sum(2, keepdim=True) / 47
        true = (true - mean) / (var + 1e-6).sqrt()
    if name == "pca":
        mean, basis = components(true.flatten(0, 1), 5)
        true = (true - mean) @ basis
    return (pred - true).square().mean(2)


@pytest.mark.parametrize("name", ["default", "pixel", "norm_pixel", "pca", "tokens"])
def test_the_loss_is_its_formula(name):
    method, batch = build(CASES[name]).double(), make_batch(CASES[name], dtype=torch.float64)
    loss = method(batch)["loss"]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}
    method.zero_grad()

    pred, mask = method.model.predict(batch.images, 0.5, method.noise(batch))
    removed = mask == 1
    assert removed.sum(1).tolist() == [8] * 8
    expected = errors(name, method, batch.images, pred)[removed].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[key], parameter.grad)


def test_the_default_is_the_models_own_loss():
    for norm_pix_loss in (False, True):
        tried = case({"norm_pix_loss": norm_pix_loss})
        method, batch = build(tried), make_batch(tried)
        loss, _, _ = method.model(batch.images, 0.5, method.noise(batch))
        assert torch.equal(method(batch)["loss"], loss)
        assert method.target.state_dict() == {}
    assert build(CASES["pixel"]).model.norm_pix_loss is False
    assert build(CASES["norm_pixel"]).model.norm_pix_loss is True


def test_components_are_kept_from_the_first_step_that_is_made():
    method = build(PCA).double()
    batches = [make_batch(PCA, step, torch.float64) for step in range(3)]
    method(batches[0])
    method.skip_step()
    assert not method.target.is_fitted and not method.target.basis.any()
    method(batches[1])
    method(batches[2])
    method.after_step()
    assert method.target.is_fitted
    mean, basis = components(patches_of(batches[1].images).flatten(0, 1), 5)
    torch.testing.assert_close(method.target.mean, mean)
    torch.testing.assert_close(method.target.basis, basis)
    method(batches[2])
    method.after_step()
    torch.testing.assert_close(method.target.basis, basis)


def test_components_come_and_go_with_the_state():
    method, batch = build(PCA), make_batch(PCA)
    untrained = {key: value.clone() for key, value in method.state_dict().items()}
    method(batch)
    method.after_step()
    other = build(PCA)
    other.load_state_dict(method.state_dict())
    again = make_batch(PCA, 1)
    assert torch.equal(other(again)["loss"], method(again)["loss"])
    method.load_state_dict(untrained)
    assert not torch.equal(other(again)["loss"], method(again)["loss"])


def test_a_picture_of_components_is_their_patches():
    method, batch = build(PCA).double(), make_batch(PCA, dtype=torch.float64)
    assert method.reconstruct(batch) is None, "there are no components before the first step"
    assert not method.target.is_fitted
    method(batch)
    method.after_step()
    with torch.no_grad():
        masked, predicted, _ = method.reconstruct(batch)
        pred, mask = method.model.predict(batch.images, 0.5, method.noise(batch))
    expected = pred @ method.target.basis.T + method.target.mean
    removed = mask == 1
    torch.testing.assert_close(patches_of(predicted)[removed], expected[removed])
    assert not patches_of(masked)[removed].any()


def test_all_components_lose_nothing():
    tried = case(target="pca", num_components=48)
    method, batch = build(tried).double(), make_batch(tried, dtype=torch.float64)
    pixels, mask = patches_of(batch.images), torch.ones(8, 16).double()
    method(batch)
    method.after_step()
    true = (pixels - method.target.mean) @ method.target.basis
    torch.testing.assert_close(method.target.patches(true), pixels)
    assert method.target(method.model, batch.images, true, mask) < 1e-20


def test_the_tokenizer_is_not_trained():
    method, batch = build(CASES["tokens"]).train(), make_batch(CASES["tokens"])
    assert method.model.training and not method.target.tokenizer.training
    assert not method.target.tokenizer.scale.requires_grad
    assert torch.equal(method(batch)["loss"], method(batch)["loss"])
    assert method.reconstruct(batch) is None
    assert method.model.decoder_pred.weight.shape == (7, 8)


def test_a_tokenizer_may_be_a_module_or_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from tests.methods.test_mae_targets import Tokenizer as make\n")
    batch, losses = make_batch(PCA), []
    for tokenizer in (Tokenizer(), f"{file}:make", TOKENS["tokenizer"]):
        losses.append(build(case(**TOKENS | {"tokenizer": tokenizer}))(batch)["loss"])
    assert losses[0] == losses[1] == losses[2]


def test_an_encoder_with_mask_tokens_sees_no_hidden_pixel():
    tried = CASES["mask_in_encoder"]
    method, batch = build(tried).double(), make_batch(tried, dtype=torch.float64)
    model, noise = method.model, method.noise(batch)
    assert model.mask_token.shape == (1, 1, 16)
    latent, mask, _ = model.forward_encoder(batch.images, 0.5, noise)
    assert latent.shape == (8, 17, 16)

    # The blocks on patches of which the hidden are the mask token, with everyone's position.
    x = model.patch_embed(batch.images)
    x = torch.where(mask[..., None] == 1, model.mask_token, x) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(8, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(latent, model.norm(x))

    y = model.decoder_embed(model.norm(x)) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    pred, _ = model.predict(batch.images, 0.5, noise)
    torch.testing.assert_close(pred, model.decoder_pred(model.decoder_norm(y[:, 1:])))


def test_masks_need_a_model_that_has_the_token():
    model = MaskedAutoencoderViT(img_size=16, **TINY)
    with pytest.raises(ValueError, match="built with mask_in_encoder=True"):
        model.forward_features(torch.zeros(1, 3, 16, 16), masks=torch.ones(1, 16).bool())


@pytest.mark.parametrize(
    "args, message",
    [
        ({"target": "hog"}, "target must be one of pixel, norm_pixel, pca, tokens, got 'hog'"),
        ({"target": "pca", "num_components": 49}, "num_components must be .* at most 48, got 49"),
        ({"target": "tokens"}, "method.args.tokenizer must be file.py:factory .*got None"),
        ({"target": "tokens", "tokenizer": "gone.py:f"}, "tokenizer: gone.py cannot be imported"),
        (TOKENS | {"num_tokens": 1}, "num_tokens must be at least 2, got 1"),
        (TOKENS | {"target": "pca"}, "tokenizer needs target tokens, got target pca"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        build(case(**args))


def test_a_tokenizer_that_does_not_fit_is_named():
    tried = case(**TOKENS | {"tokenizer": Floats()})
    with pytest.raises(ValueError, match=r"must return int64 \[8, 16\], got torch.float32 \[8\]"):
        build(tried)(make_batch(tried))
