"""`LayerGradCamPlusPlus` and `LayerSmoothGradCamPlusPlus`, with the arguments of Captum's ``LayerGradCam``.

First come their equations, on tensors alone. `layer_cam.py` has what both maps share.
N samples, K channels; ``*`` stands for one or more positions, such as ``h, w``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from captum_classfilters.cam.layer_cam import (
    Channels,
    LayerCam,
    as_inputs,
    as_target,
    as_tuple,
    check_against,
    rows_of,
    warn_flat,
)
from captum_classfilters.core.captum_compat import layer_gradients, layer_outputs, log_usage
from captum_classfilters.core.check import integer, number
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.wide import wide


def pixel_alphas(second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """The weight of each position's gradient in its channel.

    Source: Chattopadhay et al. 2018, "Grad-CAM++", eq. 19: ``D2 / (2 D2 + sum(A) D3)``. For a piecewise linear network
    the derivatives of ``exp(S)`` are ``exp(S) g^p``, and ``exp(S)`` cancels. Differs: nothing is added to the
    denominator, so that small gradients count like large ones; the weight is 0 where there is no gradient; the second
    term counts only where it is positive, as it always is for Grad-CAM++ behind a ReLU. With negative activations, or
    with means over noise, it could bring the denominator near 0, and a single position would dominate the map.

    Args:
        second: ``D2``, squares of gradients, ``(N, K, *)`` float64: the square of a small float32 is 0 in float32.
        third: ``D3``, their cubes.
        activations: ``A``, ``(N, K, *)``.

    Returns:
        ``(N, K, *)``, in [0, 0.5].
    """
    total = wide(activations).flatten(2).sum(2).view(*activations.shape[:2], *[1] * (activations.dim() - 2))
    denominator = 2 * second + (total * third).relu()
    # 1 in place of 0, because a division by 0 in the branch not taken would still make gradients NaN
    divided = second / torch.where(denominator == 0, 1.0, denominator)
    return torch.where(denominator == 0, 0.0, divided)


def weights_of(first: Tensor, second: Tensor, third: Tensor, activations: Tensor) -> Tensor:
    """The weight of each channel's map: the sum of its positive gradients times the alphas of their positions.

    Source: Grad-CAM++, eq. 10; with means over noisy copies of the image in place of the derivatives, Omeiza et al.
    2019, "Smooth Grad-CAM++", eq. 13. Differs from the latter, which has ``D1`` in the numerator of alpha: here it is
    ``D2``, as in Grad-CAM++ and in other implementations.

    Args:
        first: ``D1``, gradients of the logit with respect to the layer, ``(N, K, *)`` float64, or their mean.
        second: ``D2``, their squares, or the mean of these.
        third: ``D3``, their cubes, or the mean of these.
        activations: ``(N, K, *)``.

    Returns:
        ``(N, K)`` float64, never below 0.
    """
    return (pixel_alphas(second, third, activations) * first.relu()).flatten(2).sum(2)


class LayerGradCamPlusPlus(LayerCam):
    """Where a layer's channels speak for a class.

    Source: Chattopadhay et al. 2018, "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks",
    eqs. 10 and 19. Differs: no constant in alpha's denominator, see `pixel_alphas`; the sum's ReLU is left to
    ``relu_attributions``, as in ``LayerGradCam``; chosen channels; evidence against a class. The maps of torchcam
    0.5's ``GradCAMpp`` are different: it loses the division by the denominator (done in place, on a copy), and its sum
    has each position's own gradient, while the paper has that of the weighed position.

    The model runs in eval mode, and is given back as it was.

    Args:
        forward_func: The model, or a function.
        layer: A module of it, or its dotted name; most often the last convolution's.
        device_ids: As for Captum's ``LayerGradCam``.
        reshape: Makes ``(N, K, h, w)`` of what the layer gives; None: found out, for the tokens of a ViT and for
            channels last, from the layers that give and take the tensor; what they leave open is refused. For tokens of
            14 x 14 places behind a class token it would be
            ``lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14))``. It may only move numbers: gradients are moved
            the same way.

    Example:
        >>> import torch
        >>> from captum.attr import LayerAttribution
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        ... )
        >>> heat = LayerGradCamPlusPlus(model, "0").attribute(torch.rand(3, 1, 8, 8), target=1)
        >>> heat.shape, LayerAttribution.interpolate(heat, (8, 8)).shape
        (torch.Size([3, 1, 6, 6]), torch.Size([3, 1, 8, 8]))
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
    ) -> Tensor:
        """The map of a batch.

        Args:
            inputs: What the model takes, ``(N, ...)``; a tuple for several.
            target: The class, an int, or N of them; as for ``LayerGradCam``.
            additional_forward_args: Further arguments of the forward.
            attribute_to_layer_input: The layer's input in place of its output.
            relu_attributions: Set negative values to 0, as in the paper.
            attr_dim_summation: Sum over channels; otherwise return each channel's part, 0 for those not chosen.
            grad_kwargs: Passed on to ``torch.autograd.grad``.
            channels: Only these: indices or a mask ``(K,)`` for all samples; ``(N, k)`` indices (-1 fills up), a mask
                ``(N, K)`` or a list of N index tensors, for each.
            channel_weights: None: weights of Grad-CAM++. ``"ones"``: the plain sum of activations. ``"head"``: the
                classifier head's weights for the target (Zhou et al. 2016), if the layer is the map that it reads. Or
                a tensor, ``(K,)`` or ``(N, K)``.
            against: Show evidence against the target: Grad-CAM++ of the negative output.

        Returns:
            ``(N, 1, h, w)``, or ``(N, K, h, w)`` without the sum; the dtype of the layer's output.

        Raises:
            OptionError: Channels are empty, the target is missing, or ``channel_weights`` is unknown.
            ShapeError: The layer has no positions, or nothing says which axes they are; the model's output is not
                (N, C); channels or weights are not for N samples and K channels.
            LayerError: The layer does not have one tensor in or out, does not run, or has no gradient.
            LabelError: A target is out of range.

        Warns:
            ZeroMapWarning: None of the chosen channels has a positive gradient, or the target depends on no position of
                the layer, so the map is zero.
            NoPositionsWarning: The map has a single position.
        """
        inputs, forward_args = self._moved(as_inputs(inputs)), as_tuple(additional_forward_args)
        target = as_target(target)
        check_against(against, channel_weights)
        gradients: tuple[Tensor, ...] = ()
        with self._running(attribute_to_layer_input) as watch:
            common = {"device_ids": self._devices(), "attribute_to_layer_input": attribute_to_layer_input}
            forward = self._forward(target, watch)
            if channel_weights is None:
                gradients, activations = layer_gradients(
                    forward, self.layer, inputs, target, forward_args, grad_kwargs=grad_kwargs, **common
                )
            else:
                with torch.no_grad():
                    activations = layer_outputs(forward, inputs, self.layer, forward_args, **common)
            read = self._reading(activations, watch, len(inputs[0]))
            maps = read(activations).detach()
            if isinstance(channel_weights, str) and channel_weights == "head":
                channel_weights = self._head_weights(inputs, target, forward_args, maps)

        def weigh() -> Tensor:
            # float64: squares of small gradients are 0 in float32, and in bfloat16 sums of many positions stall
            first = wide(read(gradients))
            warn_flat(first)
            first = -first if against else first
            return weights_of(first, first**2, first**3, maps)

        return self._map(maps, weigh, channels, channel_weights, relu_attributions, attr_dim_summation)


class LayerSmoothGradCamPlusPlus(LayerCam):
    """Where a layer's channels speak for a class, with derivatives averaged over noise.

    Source: Omeiza et al. 2019, "Smooth Grad-CAM++", eqs. 10 to 14. Differs: the activations are those of the clean
    image (the paper does not say; torchcam 0.5's ``SmoothGradCAMpp`` takes those of the last noisy copy, and only its
    gradient for D1); all three derivatives are means over copies; alpha has D2 in its numerator, see `weights_of`; the
    noise is seeded.

    If the layer is averaged and read by a linear head, gradients do not depend on the image: the map is that of
    `LayerGradCamPlusPlus`, at n + 1 times its cost. Noise matters for earlier layers.

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
            relu_attributions: Set negative values to 0.
            attr_dim_summation: Sum over channels.
            grad_kwargs: Passed on to ``torch.autograd.grad``.
            channels: Only these.
            channel_weights: None, ``"ones"``, ``"head"`` or a tensor. With given weights no noise is drawn.
            against: Show evidence against the target.
            n_samples: Noisy copies of each image.
            stdevs: Standard deviation of the noise, in units of the inputs; a tuple has one for each input.
            generator: Draws the noise. None: a generator of seed 0, so that the same call gives the same map.
            internal_batch_size: How many noisy copies run at once. None: N, one of each image. It changes the memory
                that is needed, and not the map.

        Returns:
            ``(N, 1, h, w)``, or ``(N, K, h, w)`` without the sum.
        """
        inputs, forward_args = self._moved(as_inputs(inputs)), as_tuple(additional_forward_args)
        target = as_target(target)
        check_against(against, channel_weights)
        spread = _check(inputs, n_samples, stdevs, internal_batch_size)
        with self._running(attribute_to_layer_input) as watch:
            with torch.no_grad():
                clean = layer_outputs(
                    self._forward(target, watch),
                    inputs,
                    self.layer,
                    forward_args,
                    device_ids=self._devices(),
                    attribute_to_layer_input=attribute_to_layer_input,
                )
            read = self._reading(clean, watch, len(inputs[0]))
            maps = read(clean)
            if isinstance(channel_weights, str) and channel_weights == "head":
                channel_weights = self._head_weights(inputs, target, forward_args, maps)

            def weigh() -> Tensor:
                sums = [torch.zeros_like(wide(maps)) for _ in range(3)]
                noise = _noisy(inputs, spread, n_samples, generator, internal_batch_size or len(inputs[0]))
                for rows, noisy in noise:
                    gradients, _ = layer_gradients(
                        self._forward(_rows_of_target(target, rows, len(inputs[0])), watch),
                        self.layer,
                        noisy,
                        _rows_of_target(target, rows, len(inputs[0])),
                        tuple(rows_of(value, rows, len(inputs[0])) for value in forward_args),
                        device_ids=self._devices(),
                        attribute_to_layer_input=attribute_to_layer_input,
                        grad_kwargs=grad_kwargs,
                    )
                    gradient = wide(read(gradients))
                    gradient = -gradient if against else gradient
                    for power, total in enumerate(sums, 1):
                        total.index_add_(0, rows.to(total.device), gradient**power)
                warn_flat(sums[1])
                first, second, third = (total / n_samples for total in sums)
                return weights_of(first, second, third, maps)

            return self._map(maps, weigh, channels, channel_weights, relu_attributions, attr_dim_summation)


def _check(inputs: tuple[Any, ...], n_samples: Any, stdevs: Any, internal_batch_size: Any) -> tuple[float, ...]:
    """The standard deviation of the noise for each input; refuses numbers out of range."""
    integer(n_samples, "n_samples", 1)
    if internal_batch_size is not None:
        integer(internal_batch_size, "internal_batch_size", 1)
    spread = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(inputs)
    if len(spread) != len(inputs):
        raise OptionError(f"stdevs must be one number, or one for each of the {len(inputs)} inputs; got {len(spread)}")
    return tuple(number(value, "stdevs", 0, meaning="in units of the inputs") for value in spread)


def _noisy(
    inputs: tuple[Tensor, ...], spread: tuple[float, ...], copies: int, generator: torch.Generator | None, size: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Noisy copies in portions: the sample of each copy, ``(B,)``, and the copies. Portions do not change the noise."""
    samples, device = len(inputs[0]), inputs[0].device
    generator = _generator(device) if generator is None else generator
    waiting: tuple[Tensor, ...] = ()
    start = made = 0
    while start < copies * samples:
        end = min(start + size, copies * samples)
        while made < end:
            # whole copies of all samples are drawn, so that the noise does not depend on the portions
            fresh = tuple(_with_noise(value, s, generator) for value, s in zip(inputs, spread, strict=True))
            waiting = tuple(map(torch.cat, zip(waiting, fresh, strict=True))) if waiting else fresh
            made += samples
        portion = tuple(value[: end - start] for value in waiting)
        waiting = tuple(value[end - start :] for value in waiting)
        yield torch.arange(start, end, device=device) % samples, portion
        start = end


def _generator(device: torch.device) -> torch.Generator:
    try:
        return torch.Generator(device).manual_seed(0)
    except (RuntimeError, NotImplementedError):  # a device without generators of its own
        return torch.Generator().manual_seed(0)


def _with_noise(value: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    # drawn on the generator's device, so that the same seed gives the same noise for images on any device
    noise = torch.randn(value.shape, generator=generator, device=generator.device, dtype=torch.float32)
    return value + spread * noise.to(value.device, value.dtype)


def _rows_of_target(target: Any, rows: Tensor, samples: int) -> Any:
    """The targets of these samples, if each sample has its own."""
    if isinstance(target, list) and len(target) == samples:
        return [target[row] for row in rows.tolist()]
    return rows_of(target, rows.to(target.device) if isinstance(target, Tensor) else rows, samples)
