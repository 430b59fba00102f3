"""The only file that may touch Captum's private names; everything else imports them from here."""

from captum._utils.gradient import _forward_layer_eval as layer_outputs
from captum._utils.gradient import compute_layer_gradients_and_eval as layer_gradients
from captum.log import log_usage

__all__ = ["layer_gradients", "layer_outputs", "log_usage"]
