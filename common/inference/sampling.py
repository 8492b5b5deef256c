"""How the next token is chosen: the user's settings, or else those of the folder's generation_config.json."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from common.errors import KitError
from common.json_file import shown
from common.settings import option, require

SOURCE = "default: generation_config.json's"
RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 <= value < inf, "it must be 0 (greedy) or more"),
    "top_p": (lambda value: 0 < value <= 1, "it must be above 0, and at most 1 (off)"),
    "top_k": (lambda value: value >= 0 and value == int(value), "it must be 0 (off) or a number of tokens"),
    "repetition_penalty": (lambda value: 0 < value < inf, "it must be above 0; 1 is off"),
}


@dataclass(frozen=True)
class SamplingSettings:
    """Generation."""

    max_new_tokens: int = option(512, "maximum length of an answer in tokens")
    temperature: float | None = option(None, f"0: the likeliest token (greedy); {SOURCE}, or else greedy")
    top_p: float | None = option(None, f"sample from the likeliest tokens of this total probability; {SOURCE}, or 1")
    top_k: int | None = option(None, f"sample from so many tokens; 0: all; {SOURCE}, or 0")
    repetition_penalty: float | None = option(None, f"above 1 against repetition; {SOURCE}, or 1")
    seed: int = option(1234, "seed of sampling; with it, BATCH_SIZE and the device decide the answers")

    def check(self) -> None:
        """Raises KitError for a value out of its range."""
        require(self, "max_new_tokens", self.max_new_tokens >= 1, "it must be at least 1")
        for name, (holds, rule) in RULES.items():
            value = getattr(self, name)
            require(self, name, value is None or holds(value), rule)


@dataclass(frozen=True)
class Sampling:
    """The values in effect; a temperature of 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    def __str__(self) -> str:
        penalty = "" if self.repetition_penalty == 1 else f", repetition penalty {self.repetition_penalty:g}"
        if not self.temperature:
            return f"greedy{penalty}"
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k}{penalty}"

    def fields(self) -> dict[str, Any]:
        """The same as fields of transformers' GenerationConfig."""
        if not self.temperature:
            return {"do_sample": False, "repetition_penalty": self.repetition_penalty}
        return {"do_sample": True, **self.__dict__}


def effective_sampling(settings: SamplingSettings, generation: dict[str, Any]) -> Sampling:
    """`settings`, where they are not set the folder's generation_config.json, `generation`.

    Raises KitError for values out of range, and for TOP_P or TOP_K where nothing is sampled.
    """
    settings.check()
    temperature = settings.temperature
    if temperature is None:
        temperature = _own(generation, "temperature", 1.0) if generation.get("do_sample") is True else 0.0
    for name in ("top_p", "top_k"):
        if not temperature and getattr(settings, name) is not None:
            why = "TEMPERATURE=0" if settings.temperature is not None else "generation_config.json"
            raise KitError(
                f"{name.upper()}={getattr(settings, name)} has no effect: {why} makes it greedy: set TEMPERATURE above"
                f" 0, or leave {name.upper()} empty"
            )
    values = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    for name, off in values.items():
        own = getattr(settings, name)
        values[name] = _own(generation, name, off) if own is None else own
    return Sampling(temperature, values["top_p"], int(values["top_k"]), values["repetition_penalty"])


def _own(generation: dict[str, Any], name: str, default: float) -> float:
    """The value of generation_config.json, or `default`; raises KitError for one that is no number or out of range."""
    value = generation.get(name)
    if value is None:
        return default
    holds, rule = RULES[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
        raise KitError(f"generation_config.json: {name}={shown(value)}: {rule}: set {name.upper()}")
    return value
