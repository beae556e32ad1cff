"""Fused kernels, one subpackage each. Sources live in <repo>/kernels; wheels contain them here."""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
if (_CHECKOUT / "csrc").is_dir():  # running from a checkout, not from a wheel
    __path__.append(str(_CHECKOUT / "kernels"))
