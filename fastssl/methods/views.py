"""The views that papers train on: groups of keywords of `View`, on top of the image size.

Where a group says nothing of the scale of its crops, that is [0.2, 1].
"""

_JITTER = {"jitter": 0.8, "grey": 0.2}
_STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}

# Wu et al., 2018, arXiv:1805.01978.
NPID = ({"grey": 0.2, "jitter": 1.0, "saturation": 0.4, "hue": 0.4},)
# Chen et al., 2020, arXiv:2002.05709.
SIMCLR = ({"number": 2, "scale": (0.08, 1.0), **_JITTER, **_STRONG, "blur": 0.5},)
# He et al., 2020, arXiv:1911.05722, and Chen et al., 2020, arXiv:2003.04297.
MOCO_V1 = ({"number": 2, "grey": 0.2, "jitter": 1.0, "saturation": 0.4, "hue": 0.4},)
MOCO_V2 = ({"number": 2, **_JITTER, "saturation": 0.4, "blur": 0.5},)
# Grill et al., 2020, arXiv:2006.07733; Barlow Twins (2103.03230) and MoCo v3 (2104.02057), too.
BYOL = (
    {"scale": (0.08, 1.0), **_JITTER, "blur": 1.0},
    {"scale": (0.08, 1.0), **_JITTER, "blur": 0.1, "solarize": 0.2},
)
# Bardes et al., 2022, arXiv:2105.04906.
VICREG = ({"number": 2, "scale": (0.08, 1.0), **_JITTER, "blur": 0.5, "solarize": 0.1},)
# Caron et al., 2020, arXiv:2006.09882.
SWAV = (
    {"number": 2, "scale": (0.14, 1.0), **_JITTER, **_STRONG, "blur": 0.5},
    {"number": 6, "size": 96, "scale": (0.05, 0.14), **_JITTER, **_STRONG, "blur": 0.5},
)


def _multi_crop(smallest: float, between: float) -> tuple[dict, ...]:
    return (
        {"scale": (between, 1.0), **_JITTER, "blur": 1.0},
        {"scale": (between, 1.0), **_JITTER, "blur": 0.1, "solarize": 0.2},
        {"number": 8, "size": 96, "scale": (smallest, between), **_JITTER, "blur": 0.5},
    )


# Caron et al., 2021, arXiv:2104.14294.
DINO = _multi_crop(0.05, 0.4)
# Zhou et al., 2022, arXiv:2111.07832; for ViT-S.
IBOT = _multi_crop(0.05, 0.25)
# Oquab et al., 2023, arXiv:2304.07193.
DINOV2 = _multi_crop(0.05, 0.32)
# Assran et al., 2022, arXiv:2204.07141.
MSN = (
    {"number": 2, "scale": (0.3, 1.0), **_JITTER, "saturation": 0.4, "blur": 0.5},
    {"number": 10, "size": 96, "scale": (0.05, 0.3), **_JITTER, "saturation": 0.4, "blur": 0.5},
)
