"""The story of a lifecycle: what its stages made of a model, for people. Drawn and written once, and then shown by
MLflow, DVC and the report page alike.

Left out on purpose: computation. What is shown was measured by a stage; this package reads it.
"""
