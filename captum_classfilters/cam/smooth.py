"""`LayerSmoothGradCamPlusPlus`: Grad-CAM++ whose derivatives are means over noisy copies of the image."""

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from captum_classfilters.cam.channels import Channels
from captum_classfilters.cam.equations import channel_weights as weights_of
from captum_classfilters.cam.layer_cam import LayerCam, as_inputs, as_target, as_tuple, check_against, rows_of
from captum_classfilters.core.captum_compat import layer_gradients, layer_outputs, log_usage
from captum_classfilters.core.errors import OptionError


class LayerSmoothGradCamPlusPlus(LayerCam):
    """Where a layer's channels speak for a class, with derivatives that noise does not turn round.

    Source: Omeiza et al. 2019, "Smooth Grad-CAM++", eqs. 10 to 14. Differs: the activations are those of the clean
    image (the paper does not say; torchcam 0.5's ``SmoothGradCAMpp`` weighs those of the last noisy copy, and takes its
    gradient alone for D1); all three derivatives are means over copies; alpha has D2 in its numerator, see
    `equations.channel_weights`; the noise is seeded.

    Where the layer is averaged and read by a linear head, gradients do not depend on the image: the map is then that of
    `LayerGradCamPlusPlus`, at n + 1 times its cost. Noise matters for layers before.

    The model runs in eval mode, and is given back as it was. Arguments as for `LayerGradCamPlusPlus`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        ... )
        >>> smooth = LayerSmoothGradCamPlusPlus(model, "0")
        >>> smooth.attribute(torch.rand(3, 1, 8, 8), target=1, n_samples=4, stdevs=0.1).shape
        torch.Size([3, 1, 6, 6])
    """

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        channels: Channels = None,
        channel_weights: str | Tensor | None = None,
        against: bool = False,
        n_samples: int = 5,
        stdevs: float | tuple[float, ...] = 0.3,
        generator: torch.Generator | None = None,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """The map of a batch. Arguments, result and errors beside these as in `LayerGradCamPlusPlus.attribute`.

        Args:
            inputs: What the model takes, ``(N, ...)``; a tuple for several. Floating ones get noise.
            target: The class, an int, or N of them.
            additional_forward_args: Further arguments of the forward; tensors of N entries are one for each sample.
            attribute_to_layer_input: The layer's input in place of its output.
            relu_attributions: Only what is positive.
            attr_dim_summation: Sum over channels.
            grad_kwargs: Passed on to ``torch.autograd.grad``.
            channels: Only these.
            channel_weights: None, ``"ones"``, ``"head"`` or a tensor. Where given, no noise is needed and none is made.
            against: What speaks against the target.
            n_samples: Noisy copies of each image.
            stdevs: Of the noise, in units of the inputs; a tuple has one for each input.
            generator: Of the noise. None: seeded with 0, so that the same call gives the same map.
            internal_batch_size: Copies that run at once, of all images together. None: N, one of each image. The map
                does not depend on it, memory does.

        Returns:
            ``(N, 1, h, w)``, or ``(N, K, h, w)`` without the sum.
        """
        inputs, forward_args = as_inputs(inputs), as_tuple(additional_forward_args)
        target = as_target(target)
        check_against(against, channel_weights)
        spread = _check(inputs, n_samples, stdevs, internal_batch_size)
        with self._borrowed():
            with torch.no_grad():
                clean = layer_outputs(
                    self._forward(target),
                    inputs,
                    self.layer,
                    forward_args,
                    device_ids=self._devices(),
                    attribute_to_layer_input=attribute_to_layer_input,
                )
            maps = self._one_map(clean, "activation")
            if isinstance(channel_weights, str) and channel_weights == "head":
                channel_weights = self._head_weights(inputs, target, forward_args, maps)

            def weigh() -> Tensor:
                sums = [torch.zeros(maps.shape, dtype=torch.float64, device=maps.device) for _ in range(3)]
                noise = _noisy(inputs, spread, n_samples, generator, internal_batch_size or len(inputs[0]))
                for rows, noisy in noise:
                    gradients, _ = layer_gradients(
                        self._forward(_rows_of_target(target, rows, len(inputs[0]))),
                        self.layer,
                        noisy,
                        _rows_of_target(target, rows, len(inputs[0])),
                        tuple(rows_of(value, rows, len(inputs[0])) for value in forward_args),
                        device_ids=self._devices(),
                        attribute_to_layer_input=attribute_to_layer_input,
                        grad_kwargs=grad_kwargs,
                    )
                    gradient = self._one_map(gradients, "gradient").double()
                    gradient = -gradient if against else gradient
                    for power, total in enumerate(sums, 1):
                        total.index_add_(0, rows, gradient**power)
                first, second, third = (total / n_samples for total in sums)
                return weights_of(first, second, third, maps)

            return self._map(maps, weigh, channels, channel_weights, relu_attributions, attr_dim_summation)


def _check(inputs: tuple[Any, ...], n_samples: Any, stdevs: Any, internal_batch_size: Any) -> tuple[float, ...]:
    """The noise's size for each input; refuses numbers that cannot be."""
    for name, value in (("n_samples", n_samples), ("internal_batch_size", internal_batch_size)):
        if value is None and name == "internal_batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
    spread = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(inputs)
    if len(spread) != len(inputs):
        raise OptionError(f"stdevs must be one number, or one for each of the {len(inputs)} inputs; got {len(spread)}")
    for value in spread:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
            raise OptionError(f"stdevs must be finite and not below 0, in units of the inputs; got {value!r}")
    return tuple(map(float, spread))


def _noisy(
    inputs: tuple[Tensor, ...], spread: tuple[float, ...], copies: int, generator: torch.Generator | None, size: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Noisy copies in portions: whose copies, ``(B,)``, and the copies. Portions do not change the noise."""
    samples, device = len(inputs[0]), inputs[0].device
    generator = torch.Generator(device).manual_seed(0) if generator is None else generator
    waiting: tuple[Tensor, ...] = ()
    start = made = 0
    while start < copies * samples:
        end = min(start + size, copies * samples)
        while made < end:
            # copy by copy, each whole
            fresh = tuple(_with_noise(value, s, generator) for value, s in zip(inputs, spread, strict=True))
            waiting = tuple(map(torch.cat, zip(waiting, fresh, strict=True))) if waiting else fresh
            made += samples
        portion = tuple(value[: end - start] for value in waiting)
        waiting = tuple(value[end - start :] for value in waiting)
        yield torch.arange(start, end, device=device) % samples, portion
        start = end


def _with_noise(value: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    # drawn where the generator is: the same seed gives the same noise wherever the images are
    noise = torch.randn(value.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return value + spread * noise.to(value.device, value.dtype)


def _rows_of_target(target: Any, rows: Tensor, samples: int) -> Any:
    """The targets of these samples, where there is one for each."""
    if isinstance(target, list) and len(target) == samples:
        return [target[row] for row in rows.tolist()]
    return rows_of(target, rows.to(target.device) if isinstance(target, Tensor) else rows, samples)
