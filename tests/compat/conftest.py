"""What a fake device cannot do, for it has no values, runs where there are some."""

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def real_device(request: pytest.FixtureRequest) -> str:
    return request.param
