"""Grad-CAM++ and Smooth Grad-CAM++ as Captum layer attributions, of all channels of a layer or of chosen ones."""

from captum_classfilters.cam.grad_cam_plus_plus import LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus

__all__ = ["LayerGradCamPlusPlus", "LayerSmoothGradCamPlusPlus"]
