"""Who runs what, whether it is right, and how gradients flow back through time."""

from rnnkernels.diagnostics._choices import Choice, Explanation, explain
from rnnkernels.diagnostics._flow import GradientFlow, Record, gradient_flow
from rnnkernels.diagnostics._verify import Row, Verification, verify

__all__ = [
    "Choice",
    "Explanation",
    "GradientFlow",
    "Record",
    "Row",
    "Verification",
    "explain",
    "gradient_flow",
    "verify",
]
