"""What the tests share: the devices, a small network with a head, seeds that stay local."""

import os

os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from shared import SECOND, SmallCNN, device_mode, seeded, started_gate
from torch import Tensor
from torch._subclasses import FakeTensorMode

from captum_classfilters import LabelSensitiveGate

# The networks here are small: threads would cost more than they bring
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first: with several processes none is left to run alone at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/tutorials/test_notebooks", "tests/test_demo")))


class _FakeCuda(FakeTensorMode):
    """CUDA tensors without a GPU or values: shapes and devices are computed, and every number asked for is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.aten.equal.default:
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


@cache
def _has_fake_cuda() -> bool:
    """Older torch (2.4), built for CUDA, asks for a driver even where a tensor is copied to a fake device."""
    try:
        with _FakeCuda(allow_non_fake_inputs=True):
            torch.zeros(1).to("cuda")
    except RuntimeError:
        if hasattr(torch.compiler, "set_stance"):  # 2.6 or newer: then something else is wrong
            raise
        return False
    return True


class Device(NamedTuple):
    """Where tensors and models are to be made; ``with device.mode:`` around it all."""

    name: str
    mode: AbstractContextManager[Any]


@pytest.fixture(
    params=[
        "cpu",
        "fake cuda",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
        *SECOND,
    ]
)
def device(request: pytest.FixtureRequest) -> Device:
    """CPU, CUDA, and CUDA without a GPU, where a tensor made on the wrong device is an error all the same.

    Make tensors on the CPU with a local generator and move them ``.to(device.name)``; make models there, as `small_cnn`
    does; compare with `assert_close`.
    """
    if request.param == "fake cuda":
        if not _has_fake_cuda():
            pytest.skip("this torch has no fake CUDA without a driver")
        return Device("cuda", _FakeCuda(allow_non_fake_inputs=True))
    return Device(request.param, device_mode(request.param))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """``torch.testing.assert_close``; on a fake device only shape, dtype and device are compared."""

    def check(actual: Tensor, expected: Tensor, **tolerances: Any) -> None:
        if isinstance(actual, torch._subclasses.FakeTensor):
            found = (actual.shape, actual.dtype, actual.device.type)
            assert found == (expected.shape, expected.dtype, expected.device.type)
        else:
            torch.testing.assert_close(actual, expected, **tolerances)

    return check


@pytest.fixture
def small_cnn() -> Callable[..., SmallCNN]:
    """Makes a `SmallCNN` in eval mode with weights from a local seed; ``device=`` and the size may be given."""

    def make(seed: int = 0, device: torch.device | str = "cpu", **size: Any) -> SmallCNN:
        with torch.device(device):
            model = SmallCNN(**size)
        return seeded(model, seed).eval()

    return make


@pytest.fixture
def model(small_cnn: Callable[..., SmallCNN]) -> SmallCNN:
    """For training: in train mode, dropout off, so that two passes are the same."""
    network = small_cnn().train()
    network.dropout.p = 0.0
    return network


@pytest.fixture
def gate() -> LabelSensitiveGate:
    """Fits `small_cnn`: C = 4, K = 6."""
    return started_gate()


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Makes ``count`` images of 3 x 8 x 8 from a local seed, on the CPU."""

    def make(count: int = 6, seed: int = 1, size: int = 8) -> Tensor:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))

    return make
