"""What is trained: all weights, some of them, or LoRA's adapters."""

from dataclasses import dataclass

from common.errors import KitError
from common.model.shape.lora import ALL_LINEAR, MODULES, LoraConfig
from common.settings import option, require

RANK, DROPOUT = 16, 0.0


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What is trained."""

    tuner: str = option("full", "full: train all weights; lora: adapters alone", ("full", "lora"))
    trainable: str | None = option(None, "train these weights alone: patterns over Hugging Face's names")
    freeze: str | None = option(None, "train all weights but these, as model.embed_tokens.* lm_head.*")
    lora_rank: int | None = option(None, f"rank of the adapters; default: {RANK}, or lora_adapter's")
    lora_alpha: float | None = option(None, "their output is scaled by alpha / rank; default: twice the rank")
    lora_dropout: float | None = option(None, f"dropout of their input; default: {DROPOUT:g}")
    lora_targets: str | None = option(None, f"modules, as q_proj,v_proj; default: {ALL_LINEAR}")
    lora_adapter: str | None = option(None, "PEFT folder of an adapter to start from")

    def check_lora(self) -> None:
        """Raises KitError for values out of range or in conflict."""
        require(self, "lora_rank", self.lora_rank is None or self.lora_rank >= 1, "it must be at least 1")
        require(self, "lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "it must be above 0")
        dropout = self.lora_dropout
        require(self, "lora_dropout", dropout is None or 0 <= dropout < 1, "it must be at least 0 and below 1")
        unknown = set(self._targets()) - set(MODULES)
        require(self, "lora_targets", not unknown, f"give {ALL_LINEAR}, or some of {','.join(MODULES)}")
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_adapter")
        given = [name for name in names if getattr(self, name) is not None]
        if self.tuner == "lora" and (self.trainable or self.freeze):
            name = "trainable" if self.trainable else "freeze"
            raise KitError(f"{name.upper()}={getattr(self, name)} is for TUNER=full; LoRA trains the adapters alone")
        if given and self.tuner == "full":
            raise KitError(f"{given[0].upper()}={getattr(self, given[0])} is for TUNER=lora, not full: change one")

    def _targets(self) -> tuple[str, ...]:
        """The modules, in the order of MODULES; unknown names after them."""
        if self.lora_targets in (None, ALL_LINEAR):
            return MODULES
        words = [word.strip() for word in str(self.lora_targets).split(",")]
        return tuple(word for word in MODULES if word in words) + tuple(word for word in words if word not in MODULES)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters of a new run; None with TUNER=full."""
        return self.lora_config() if self.tuner == "lora" else None

    def lora_config(self, start: LoraConfig | None = None) -> LoraConfig:
        """The adapters of a new run, or of one that continues `start`.

        Raises KitError where a setting that is given contradicts `start`; dropout may differ.
        """
        if start is None:
            rank = self.lora_rank or RANK
            return LoraConfig(rank, self.lora_alpha or 2.0 * rank, self._targets(), self.lora_dropout or DROPOUT)
        own = {"lora_rank": start.rank, "lora_alpha": start.alpha, "lora_targets": start.targets}
        given = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        given["lora_targets"] = self._targets() if self.lora_targets else None  # type: ignore[assignment]
        for name, value in own.items():
            if given[name] not in (None, value):
                shown = ",".join(value) if isinstance(value, tuple) else f"{value:g}"
                raise KitError(
                    f"{name.upper()}={getattr(self, name)}: the adapter that the run continues has {shown}: set it to"
                    " that, or to nothing"
                )
        dropout = start.dropout if self.lora_dropout is None else self.lora_dropout
        return LoraConfig(start.rank, start.alpha, start.targets, dropout)
