"""`PathAttribution`: gates as a Captum layer attribution."""

from typing import Any

from captum.attr import LayerAttribution
from torch import Tensor

from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.captum_compat import log_usage
from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling.decoupler import PathDecoupler


class PathAttribution(LayerAttribution):
    """Which channels each input opens, for every gated layer at once.

    The same numbers as ``LayerActivation(decoupler, list(decoupler.controllers))``; here they come in one pass, in eval
    mode, and as g of eq. 2 if wanted. Gates do not depend on a target. Works under Captum's ``NoiseTunnel``: the mean
    over noisy copies is then how often a channel is open in the neighbourhood of an image.

    Source: "Interpretable neural network decoupling", eq. 5. No difference.

    Args:
        decoupler: A `PathDecoupler`.

    Raises:
        OptionError: It is none.
    """

    def __init__(self, decoupler: PathDecoupler) -> None:
        inner = unwrap(decoupler)
        if not isinstance(inner, PathDecoupler):
            raise OptionError(
                f"expected a PathDecoupler, got {type(decoupler).__name__}; PathDecoupler(model) makes one"
            )
        super().__init__(inner, list(inner.controllers))

    @property
    def multiplies_by_inputs(self) -> bool:
        """Gates are no product with an input."""
        return False

    @log_usage()
    def attribute(
        self, inputs: Any, additional_forward_args: Any = None, *, logits: bool = False
    ) -> tuple[Tensor, ...]:
        """The gates of each input.

        Args:
            inputs: What the model takes, ``(N, ...)``; a tuple for several.
            additional_forward_args: Further arguments of the forward.
            logits: Give g of eq. 2, positive where a channel is open, instead of gates.

        Returns:
            For each layer ``(N, K_l)`` float32: 0 and 1, or g.
        """
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        further = additional_forward_args
        further = () if further is None else further if isinstance(further, tuple) else (further,)
        decoupler: PathDecoupler = self.forward_func
        with borrowed(decoupler):
            read = decoupler.gate_logits if logits else decoupler.gates
            _, gates = read(*args, *further)
        return gates
