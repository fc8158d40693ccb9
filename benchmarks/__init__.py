"""Measures our layers against others: ``python -m benchmarks.run``.

``cases`` and ``suites`` say what is measured; ``problem`` makes a case ready, with the right
results; ``providers`` run it; ``correctness`` judges; ``contest`` compares, with ``timing`` and
``memory`` on a ``device``. ``sequences``, ``ragged``, ``concurrent``, ``breakdown``, ``truncated``
and ``flow`` are suites with ways of their own. From a ``record``, ``report`` makes tables,
``plots`` pictures, and ``readme`` puts the tables into documents; ``compare`` tells what changed
between two.
"""
