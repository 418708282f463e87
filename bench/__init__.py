"""Measurements: each module is run with `python -m bench.NAME`, prints a table and leaves one JSON in bench/results.

Nothing imports this package. What was learned stands in LOG.md.
"""
