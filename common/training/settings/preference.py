"""The loss of preference training (TRAIN_MODE=dpo)."""

from dataclasses import dataclass, fields

from common.errors import KitError
from common.settings import option, require


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Preference training."""

    dpo_loss: str = option(
        "sigmoid", "dpo: the loss of a pair; orpo needs no reference", ("sigmoid", "ipo", "orpo")
    )  # fmt: skip
    dpo_beta: float = option(0.1, "dpo: beta of DPO and IPO, lambda of ORPO")
    dpo_label_smoothing: float = option(0.0, "dpo, sigmoid: the share of pairs whose preference may be wrong")
    dpo_sft_weight: float = option(0.0, "dpo, sigmoid or ipo: weight of the chosen answers' own loss per token")

    def check_preference(self, train_mode: str, cp: int) -> None:
        """Raises KitError for values out of range or in conflict with each other, TRAIN_MODE or CP."""
        if train_mode != "dpo":
            self._check_unused(train_mode)
            return
        smooth, loss = self.dpo_label_smoothing, self.dpo_loss
        require(self, "dpo_beta", self.dpo_beta > 0, "it must be above 0")
        require(self, "dpo_label_smoothing", 0 <= smooth < 0.5, "it must be at least 0 and below 0.5")
        require(self, "dpo_sft_weight", self.dpo_sft_weight >= 0, "it must not be negative")
        require(self, "dpo_label_smoothing", not smooth or loss == "sigmoid", f"DPO_LOSS={loss} has none: set it to 0")
        if self.dpo_sft_weight and loss == "orpo":
            raise KitError(
                f"DPO_SFT_WEIGHT={self.dpo_sft_weight:g} with DPO_LOSS=orpo, which has the chosen answers' own loss in"
                " it: set DPO_SFT_WEIGHT=0, and DPO_BETA to the weight of the odds"
            )
        if cp > 1:
            raise KitError(
                f"CP={cp} is not supported with TRAIN_MODE=dpo, which sums an answer's tokens on one rank: set CP=1"
            )

    def _check_unused(self, train_mode: str) -> None:
        """Raises KitError for a setting that is changed and has no effect."""
        for each in fields(PreferenceSettings):
            value = getattr(self, each.name)
            if value != each.default:
                raise KitError(
                    f"{each.name.upper()}={value} is for TRAIN_MODE=dpo, and this is TRAIN_MODE={train_mode}: change"
                    f" one of them; its default is {each.default}"
                )
