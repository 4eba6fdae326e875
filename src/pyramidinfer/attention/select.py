"""Pick an attention backend by name, or the fastest one that a device has."""

from __future__ import annotations

import warnings

import torch

from pyramidinfer.attention.base import Backend
from pyramidinfer.attention.reference import ReferenceBackend
from pyramidinfer.native import NoCompilerError, why_not

__all__ = ["AUTO", "available_backends", "select_backend"]

AUTO = "auto"
BACKENDS = ("cpu", "reference", "triton")


def available_backends() -> list[str]:
    """Names that ``select_backend`` accepts, whether or not they work on this machine."""
    return list(BACKENDS)


def select_backend(name: str = AUTO, device: torch.device | str = "cpu") -> Backend:
    """A backend for tensors on ``device``.

    ``"auto"``: ``triton`` on a GPU, ``cpu`` elsewhere; ``reference`` if the C++ kernels
    cannot be built, with a warning that says why.  ``ValueError`` if the backend cannot work on the
    device.
    """
    kind = torch.device(device).type
    if name == AUTO:
        name = "triton" if kind == "cuda" else "cpu"
        if name == "cpu" and (reason := why_not()):
            warnings.warn(f"slow attention in plain torch: {reason}", RuntimeWarning, stacklevel=2)
            name = "reference"
    if name == "reference":
        return ReferenceBackend()
    if name == "cpu":
        if kind not in ("cpu", "meta"):
            raise ValueError(f"backend='cpu' cannot attend on {device}: use 'triton' or 'auto'")
        from pyramidinfer.attention.cpu import CPUBackend

        try:
            return CPUBackend()
        except NoCompilerError as error:
            raise ValueError(f"backend='cpu' does not work here: {error}") from None
    if name == "triton":
        try:
            from pyramidinfer.attention.triton_backend import TritonBackend
        except ImportError as error:
            raise ValueError(
                f"backend='triton' needs the package triton, 3.5 or newer ({error}): "
                f"pip install 'triton>=3.5'"
            ) from None
        return TritonBackend()
    raise ValueError(f"backend={name!r} is unknown: use one of {[AUTO, *BACKENDS]}")
