"""The passes, one file each; `driver` holds their order, runs them and checks them.

simplify           graph -> graph      remove assertions, inactive dropout, identities
bind               graph -> graph      label every value with its binding time
split_skips        graph -> graph      compute the skip's half of a decoder convolution once per group
partition          graph -> program    cut the graph into stages
forecast_features  program -> program  predict what the decoder reads from the last two key steps, if that is asked for
batch_steps        stage -> graph      vmap a stage over the steps of a group
fold_slices        graph -> graph      store the parts of weights that a stage reads, for packages that hold weights
"""

from __future__ import annotations

from fdcompile.graph.store import load_graph
from fdcompile.passes.batch_steps import batch_steps
from fdcompile.passes.driver import OPTIONAL_PASSES, PASSES, Pass, enabled_passes, run_pass, run_passes
from fdcompile.passes.dump import DUMP_VARIABLE
from fdcompile.passes.fold_slices import fold_slices
from fdcompile.passes.forecast_features import forecast_features

__all__ = [
    "DUMP_VARIABLE",
    "OPTIONAL_PASSES",
    "PASSES",
    "Pass",
    "batch_steps",
    "enabled_passes",
    "fold_slices",
    "forecast_features",
    "load_graph",
    "run_pass",
    "run_passes",
]
