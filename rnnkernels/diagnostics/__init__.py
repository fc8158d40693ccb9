"""Who runs what, and how gradients flow back through time."""

from rnnkernels.diagnostics._choices import Choice, Explanation, explain
from rnnkernels.diagnostics._flow import GradientFlow, Record, gradient_flow

__all__ = ["Choice", "Explanation", "GradientFlow", "Record", "explain", "gradient_flow"]
