"""Numbers of layers per pipeline stage that the installed Megatron-Core supports."""

from collections.abc import Sequence

from common.engine.versions import first_version_with, installed_engine
from common.errors import KitError


def first_and_last_differ(chunk_layers: Sequence[int], vpp: int) -> bool:
    """Whether only the first and the last stage differ from the others, which every version supports."""
    return vpp == 1 and len(set(chunk_layers[1:-1])) <= 1


def supports(chunk_layers: Sequence[int], vpp: int) -> bool:
    """Whether the installed version supports chunks with these numbers of layers; if none is, whether all do."""
    try:
        check_pipeline_layers(chunk_layers, vpp)
    except KitError:
        return False
    return True


def check_pipeline_layers(chunk_layers: Sequence[int], vpp: int) -> None:
    """Raises KitError unless the installed version supports chunks with these numbers of layers."""
    if len(set(chunk_layers)) == 1 or first_and_last_differ(chunk_layers, vpp):
        return
    engine = installed_engine()
    if not engine.uneven_pipeline_layers:
        oldest = first_version_with(lambda each: each.uneven_pipeline_layers)
        raise KitError(
            f"PIPELINE_LAYERS={','.join(map(str, chunk_layers))} with VPP={vpp} needs megatron-core {oldest} or later,"
            f" and {engine.name} is installed: let only the first and the last stage differ, at VPP=1, or install a"
            " later one"
        )
