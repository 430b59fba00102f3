"""A gated network rewritten so that closed channels cost nothing: plain modules and gates in, no method's classes."""

from captum_classfilters.skipping.network import SkippingNetwork as SkippingNetwork
