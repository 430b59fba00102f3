"""Heads that are really cheaper: fewer features for each class, closed-form refits, retraining."""

from captum_classfilters.heads.decompose import decompose
from captum_classfilters.heads.decomposed_linear import DecomposedLinear
from captum_classfilters.heads.export import export_onnx
from captum_classfilters.heads.moments import HeadMoments
from captum_classfilters.heads.recover import recover
from captum_classfilters.heads.refitting import RefitOptions

__all__ = ["DecomposedLinear", "HeadMoments", "RefitOptions", "decompose", "export_onnx", "recover"]
