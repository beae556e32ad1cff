"""MAE and HieraMAE: keyed masks, and pictures that say what the loss sees."""

import pytest
import torch

from fastssl.data import Batch
from fastssl.methods import MAE, HieraMAE, build_method

ARGS = {
    "mae": {
        "model": "MaskedAutoencoderViT",
        "model_args": {
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "decoder_embed_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
            "norm_pix_loss": True,
        },
        "image_size": [16, 24],
    },
    "hiera_mae": {
        "model": "MaskedAutoencoderHiera",
        "model_args": {
            "embed_dim": 8,
            "stages": [1, 1, 1],
            "q_pool": 2,
            "mask_unit_attn": [True, False, False],
            "decoder_embed_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
        "image_size": [64, 96],
    },
}
# Pixels along the side of what is hidden as a whole: a patch, a mask unit.
UNIT = {"mae": 4, "hiera_mae": 32}


def make(name, seed=5, mask_ratio=0.5, **model_args):
    torch.manual_seed(0)
    options = ARGS[name] | {"model_args": ARGS[name]["model_args"] | model_args}
    return build_method(name, args={"mask_ratio": mask_ratio}, seed=seed, **options)


def make_batch(name, index=(3, 11), epoch=0, view=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(index), 3, *ARGS[name]["image_size"], generator=generator)
    return Batch((images,), torch.tensor(index), epoch, view)


def hidden(method, name, batch):
    """[B, units] bool, from the picture: what `reconstruct` shows as removed."""
    masked, _, true = method.reconstruct(batch)
    unit = UNIT[name]
    changed = (masked != true).all(1)
    height, width = changed.shape[1] // unit, changed.shape[2] // unit
    return changed.view(-1, height, unit, width, unit).transpose(2, 3).flatten(3).all(3).flatten(1)


@pytest.mark.parametrize("name", ARGS)
def test_masks_are_keyed_by_seed_epoch_index_and_view(name):
    method = make(name)
    base = method.noise(make_batch(name))
    swapped = method.noise(make_batch(name, index=(11, 3)))
    assert torch.equal(base, swapped.flip(0)), "a sample's mask does not depend on its neighbours"
    torch.rand(10)
    assert torch.equal(base, method.noise(make_batch(name))), "nor on the global generator"
    for other in (
        method.noise(make_batch(name, epoch=1)),
        method.noise(make_batch(name, view=1)),
        method.noise(make_batch(name, index=(4, 12))),
        make(name, seed=6).noise(make_batch(name)),
    ):
        assert not torch.equal(base, other)


@pytest.mark.parametrize("name", ARGS)
def test_the_share_of_hidden_units_is_the_mask_ratio(name):
    batch = make_batch(name)
    removed = hidden(make(name, mask_ratio=0.5), name, batch)
    assert removed.shape[1] == (24 if name == "mae" else 6)
    assert removed.sum(1).tolist() == [removed.shape[1] // 2] * 2


@pytest.mark.parametrize("name", ARGS)
def test_hidden_are_the_units_with_the_largest_noise(name):
    method, batch = make(name), make_batch(name)
    noise = method.noise(batch)
    expected = noise > noise.median(1, keepdim=True).values
    assert torch.equal(hidden(method, name, batch), expected)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("name", ARGS)
def test_loss_is_the_error_of_the_picture(name, norm_pix_loss):
    """The squared error between picture and truth where hidden is the loss, patch by patch."""
    method, batch = make(name, norm_pix_loss=norm_pix_loss), make_batch(name)
    with torch.no_grad():
        loss = method(batch)["loss"]
        masked, predicted, true = method.reconstruct(batch)
    assert true is batch.images
    assert torch.equal(predicted[masked == true], true[masked == true]), "seen pixels are true"
    difference, images = (method.model.patchify(x) for x in (predicted - true, true))
    if norm_pix_loss:
        difference = difference / (images.var(-1, keepdim=True) + 1e-6).sqrt()
    removed = method.model.patchify((masked != true).float()).amax(-1)
    error = (difference.square().mean(-1) * removed).sum() / removed.sum()
    torch.testing.assert_close(loss, error, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ARGS)
def test_features_are_one_vector_an_image(name):
    method, batch = make(name).eval(), make_batch(name)
    with torch.no_grad():
        both, first = method.features(batch.images), method.features(batch.images[:1])
    assert both.shape == (2, method.model.num_features)
    torch.testing.assert_close(both[:1], first, rtol=1e-5, atol=1e-6)
    assert (both[0] - both[1]).abs().max() > 1e-4, "they depend on the image"


@pytest.mark.parametrize("name", ARGS)
def test_every_trained_parameter_gets_a_gradient(name):
    method = make(name)
    method(make_batch(name))["loss"].backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


def test_factories_are_built_for_the_image_size():
    method = build_method("hiera_mae", model="mae_hiera_tiny_224", image_size=64, seed=0)
    assert isinstance(method, HieraMAE)
    assert method.model.units_shape((64, 64)) == (2, 2)
    assert method.model.tokens_spatial_shape == [16, 16] or tuple(
        method.model.tokens_spatial_shape
    ) == (16, 16)
    method = build_method(
        "mae",
        model="mae_vit_base_patch16",
        model_args={"depth": 1, "decoder_depth": 1},
        image_size=(32, 48),
    )
    assert isinstance(method, MAE)
    assert method.model.grid_size == (2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "simcrl"}, "method.name must be one of mae, hiera_mae, .*got 'simcrl'"),
        (
            {"model": "mae_vit_bas"},
            "model.name must be one of .*got 'mae_vit_bas'; .*nearest is mae_vit_base_patch16",
        ),
        (
            {"model": "vit_tiny", "model_args": {"patch_size": 4}},
            "build a MaskedAutoencoderViT .*got a VisionTransformer",
        ),
        ({"args": {"mask_ratio": 1.0}}, "method.args.mask_ratio must be between 0 and 1, got 1.0"),
        ({"args": {"ratio": 0.5}}, "method.args of mae are mask_ratio, .*; got ratio"),
        ({"model_args": {"deph": 1}}, "model.args do not fit MaskedAutoencoderViT: .*'deph'"),
        ({"image_size": 30}, r"30"),
    ],
)
def test_what_does_not_exist_or_fit_is_named(change, message):
    arguments = {"name": "mae", **ARGS["mae"]} | change
    name = arguments.pop("name")
    with pytest.raises(ValueError, match=message):
        build_method(name, **arguments)
