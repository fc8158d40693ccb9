"""The portable GPU backend: the sequence loops as Triton kernels.

=================  ==========================================================================
``cells.py``       what a hidden unit does in one step: the only place that knows a gate
``sequence.py``    the two sequence kernels, for every cell
``plan.py``        how a layer is laid out over programs
``launch.py``      what the compiled part calls to have a layer run
=================  ==========================================================================

Nothing here is imported before a layer runs on it, so that Triton need not be installed.
"""
