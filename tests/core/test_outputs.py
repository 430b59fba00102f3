"""The forms in which models return logits, and what is none of them."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from captum_classfilters import HeadPass, metrics
from captum_classfilters.core.errors import HeadError
from captum_classfilters.core.outputs import find_logits, logits_of

LOGITS = torch.arange(6.0).view(2, 3)


class WithAuxiliary(NamedTuple):
    """As torchvision's Inception returns them."""

    logits: torch.Tensor
    aux_logits: torch.Tensor


FORMS = {
    "tensor": LOGITS,
    "object": SimpleNamespace(logits=LOGITS, loss=None),
    "mapping": {"loss": torch.zeros(()), "logits": LOGITS},
    "tuple": (LOGITS, torch.zeros(2, 3)),
    "list": [LOGITS],
    "named tuple": WithAuxiliary(LOGITS, torch.zeros(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in_every_form(form):
    assert logits_of(FORMS[form]) is LOGITS
    assert find_logits(FORMS[form]) is LOGITS


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "got NoneType"),
        ((), "got tuple"),
        (([1.0], LOGITS), "got tuple"),
        ({"out": LOGITS}, r"got dict with the keys \['out'\]"),
        ({"logits": [1.0]}, r"got dict with the keys \['logits'\]"),
        (SimpleNamespace(logits=None), "got SimpleNamespace"),
    ],
    ids=repr,
)
def test_what_has_no_logits_is_refused(output, words):
    assert find_logits(output) is None
    with pytest.raises(HeadError, match=f"expected a model that returns logits.*{words}.*WithOutput"):
        logits_of(output)


@pytest.mark.parametrize("form", ["object", "mapping", "tuple"])
def test_a_measure_reads_the_head_of_a_model_of_every_form(form, small_cnn, images):
    plain = small_cnn()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, x):
            logits = self.inner(x)
            forms = {"object": SimpleNamespace(logits=logits), "mapping": {"logits": logits}, "tuple": (logits, x)}
            return forms[form]

    loader = [(images(20), torch.arange(20) % 4)]
    frames = [metrics.stability(HeadPass(model, loader), k=2, draws=5) for model in (plain, Wrapped().eval())]
    assert frames[0].equals(frames[1])
