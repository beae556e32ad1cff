"""Every family of encoders under methods that take any."""

import pytest

from tests.methods.checks import Case, check_features, check_gradients

ENCODERS = {
    "hiera": ("Hiera", {"embed_dim": 8, "stages": [1, 1, 1], "q_pool": 2}, 64),
    "resnet": ("resnet18", {"width": 8}, 32),
    "resnet_small_images": ("resnet18", {"width": 8, "small_images": True}, 16),
    "vit": (
        "VisionTransformer",
        {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        16,
    ),
    "xcit": ("XCiT", {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}, 32),
}
ARGS = {
    "simclr": {"hidden_dim": 12, "output_dim": 6},
    "npid": {"output_dim": 6, "num_negatives": 5},
    "byol": {"hidden_dim": 12, "output_dim": 6},
    "dino": {"out_dim": 11, "hidden_dim": 12, "bottleneck_dim": 6},
    "swav": {"hidden_dim": 12, "output_dim": 6, "n_prototypes": 7, "freeze_prototypes_steps": 0},
    "vicreg": {"hidden_dim": 12, "output_dim": 6},
    "rotation": {},
}


def case_of(method, encoder):
    model, model_args, size = ENCODERS[encoder]
    two_sizes = [{"number": 2}, {"size": size // 2 if encoder != "hiera" else size}]
    views = two_sizes if method in ("dino", "swav") else None
    return Case(
        method,
        ARGS[method],
        model=model,
        model_args=model_args,
        image_size=size,
        views=views,
        batch_size=4,
    )


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", ARGS)
def test_trains(method, encoder):
    check_gradients(case_of(method, encoder))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_features(encoder):
    check_features(case_of("simclr", encoder))
