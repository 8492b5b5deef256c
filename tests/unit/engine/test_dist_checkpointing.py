"""Which version of Megatron-Core loads the optimizer of which checkpoint."""

from pathlib import Path

import pytest

from common.engine import dist_checkpointing
from common.errors import KitError
from tests.unit.engine.installed import install


@pytest.mark.parametrize(
    "text, kind, those",
    [
        ("0.11.0", "fully_sharded_model_space", "megatron-core 0.14"),
        ("0.16.1", "fully_sharded_model_space", "megatron-core 0.14"),
        ("0.16.1", "of_tomorrow", "no supported version"),
    ],
)
def test_an_optimizer_that_the_version_does_not_load_is_refused(
    text: str, kind: str, those: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    message = f"/run holds the optimizer as {kind}, which {those} loads; {text[:4]} is installed: use"
    with pytest.raises(KitError, match=f"^{message} .* from its weights only: set LOAD_CHECKPOINT_PATH"):
        dist_checkpointing.check_optimizer_sharding(kind, Path("/run"), same_ranks=True)


@pytest.mark.parametrize("text", ["0.11.0", "0.14.0", "0.16.1", "0.19.2"])
def test_the_oldest_layout_loads_everywhere_only_at_its_own_sizes(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    dist_checkpointing.check_optimizer_sharding("dp_zero_gather_scatter", Path("/run"), same_ranks=True)
    with pytest.raises(KitError, match="it was saved with; use those, or start from its weights"):
        dist_checkpointing.check_optimizer_sharding("dp_zero_gather_scatter", Path("/run"), same_ranks=False)
    dist_checkpointing.check_optimizer_sharding(dist_checkpointing.OPTIMIZER_SHARDING, Path("/run"), same_ranks=False)


@pytest.mark.parametrize("same_ranks", [True, False])
def test_what_0_14_saved_resumes_under_0_14_at_any_sizes(
    same_ranks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "0.14.0", monkeypatch)
    dist_checkpointing.check_optimizer_sharding("fully_sharded_model_space", Path("/run"), same_ranks=same_ranks)
