"""Measurements. `python -m benchmarks` prints one table with every number that the design promises something about.

The modules run on their own for what the table leaves out: `decode`, `training`, `overhead`; `load` presses a served
champion, and `lifecycle` runs a recipe's model loop without orchestration, for several seeds if asked. `peers` and
`serving` compare training and serving with other projects, in environments of their own.
"""

from twinloop.flows.environment import prepare_environment

# As `twinloop` does, before torch, MLflow and Prefect read their settings.
prepare_environment()
