"""Before any test: Megatron-Core can be imported at the top of a file, as after the kit's own `prepare`."""

from common.engine.patches import add_numpy_dtypes

add_numpy_dtypes()
