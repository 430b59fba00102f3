"""`LayerGradCamPlusPlus`: Grad-CAM++ with the arguments of Captum's ``LayerGradCam``, and channels to choose."""

from typing import Any

from torch import Tensor

from captum_classfilters.cam.channels import Channels
from captum_classfilters.cam.equations import channel_weights as weights_of
from captum_classfilters.cam.layer_cam import LayerCam, as_inputs, as_target, as_tuple, check_against
from captum_classfilters.core.captum_compat import layer_gradients, log_usage


class LayerGradCamPlusPlus(LayerCam):
    """Where a layer's channels speak for a class.

    Source: Chattopadhay et al. 2018, "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks",
    eqs. 10 and 19. Differs: no constant in alpha's denominator, see `equations.pixel_alphas`; the sum's ReLU is left to
    ``relu_attributions``, as in ``LayerGradCam``; chosen channels; evidence against a class. torchcam 0.5's
    ``GradCAMpp`` loses the division by the denominator (it is done in place, on a copy), so its maps are others; and
    its sum has each position's own gradient, the paper's that of the position weighed.

    The model runs in eval mode, and is given back as it was.

    Args:
        forward_func: The model, or a function.
        layer: A module of it, or its dotted name; most often the last convolution's.
        device_ids: As for Captum's ``LayerGradCam``.
        reshape: Makes ``(N, K, h, w)`` of what the layer gives: for torchvision's Swin
            ``lambda t: t.permute(0, 3, 1, 2)``; for a ViT of 14 x 14 tokens behind a class token
            ``lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14))``. It may only move numbers about.

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
            relu_attributions: Only what is positive, as in the paper.
            attr_dim_summation: Sum over channels; otherwise each channel's part, 0 for those not chosen.
            grad_kwargs: Passed on to ``torch.autograd.grad``.
            channels: Only these: indices or a mask ``(K,)`` for all samples; ``(N, k)`` indices (-1 fills up), a mask
                ``(N, K)`` or a list of N index tensors, for each.
            channel_weights: None: those of Grad-CAM++. ``"ones"``: the plain sum of activations. ``"head"``: the
                classifier head's for the target (Zhou et al. 2016), where the layer is the map that it reads. Or a
                tensor, ``(K,)`` or ``(N, K)``.
            against: What speaks against the target: Grad-CAM++ of the negative output.

        Returns:
            ``(N, 1, h, w)``, or ``(N, K, h, w)`` without the sum; the dtype of the layer's output.

        Raises:
            OptionError: Channels, target or weights are missing, empty, or not among what they may be.
            ShapeError: The layer has no positions; channels or weights are not for N samples and K channels.
            LayerError: Not one tensor in or out of the layer.
            LabelError: A target out of range.

        Warns:
            ZeroMapWarning: None of the chosen channels has a positive gradient, so their map is zero.
        """
        inputs, forward_args = as_inputs(inputs), as_tuple(additional_forward_args)
        target = as_target(target)
        check_against(against, channel_weights)
        with self._borrowed():
            gradients, activations = layer_gradients(
                self._forward(target),
                self.layer,
                inputs,
                target,
                forward_args,
                device_ids=self._devices(),
                attribute_to_layer_input=attribute_to_layer_input,
                grad_kwargs=grad_kwargs,
            )
            maps = self._one_map(activations, "activation").detach()
            if isinstance(channel_weights, str) and channel_weights == "head":
                channel_weights = self._head_weights(inputs, target, forward_args, maps)

        def weigh() -> Tensor:
            # float64: squares of small gradients are 0 in float32, and in bfloat16 sums of many positions stall
            first = self._one_map(gradients, "gradient").double()
            first = -first if against else first
            return weights_of(first, first**2, first**3, maps)

        return self._map(maps, weigh, channels, channel_weights, relu_attributions, attr_dim_summation)
