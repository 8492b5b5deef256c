"""Keys of torchrun's store that can be asked for without waiting: torch 2.1 has no `Store.check` in Python.

A key is followed by a count of its own, since adding 0 to a count that is not there returns 0 in every torch.
"""

from torch.distributed import Store


def announce(store: Store, key: str) -> None:
    """Makes `key`, which has been set, one that `is_set`."""
    store.add(_count(key), 1)


def is_set(store: Store, key: str) -> bool:
    """Whether `key` was announced by any process."""
    return int(store.add(_count(key), 0)) > 0


def _count(key: str) -> str:
    return f"{key}/announced"
