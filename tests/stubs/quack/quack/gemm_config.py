"""The tile of a product."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """The fields that the kit sets, under QuACK's names."""

    tile_m: int
    tile_n: int
    pingpong: bool
    cluster_m: int
    cluster_n: int
    device_capacity: int
    is_dynamic_persistent: bool
