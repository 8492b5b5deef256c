"""The functions that read the installed version's layer specs."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLPSubmodules

from common.engine.versions import installed_engine


def test_the_mlp_in_a_layers_spec_is_found_and_can_be_changed() -> None:
    """Transformer Engine's spec, which cannot be made here, has its MLP from the same function."""
    layer = get_gpt_layer_local_spec().submodules
    found = installed_engine().mlp_submodules(layer)
    assert isinstance(found, MLPSubmodules)
    found.linear_fc1 = None
    assert installed_engine().mlp_submodules(layer).linear_fc1 is None
