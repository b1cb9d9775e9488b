"""Config of the refit: how the down projections are solved again after a reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from stages.settings import Settings

VERSION = 3


class PolishConfig(Settings):
    """Gradient steps on one layer's kept experts towards the original layer's outputs.

    They see the layer's sampled inputs alone: no label, no weight of another layer. Kept only where
    held-out tokens gain.
    """

    # 0: closed form only.
    steps: int = Field(default=150, ge=0)
    # Size of a step (Adam, cosine decay) in units of each tensor's root mean square.
    rate: float = Field(default=0.05, gt=0)
    # Tokens per step.
    batch: int = Field(default=1024, gt=0)
    seed: int = Field(default=0, ge=0)
    # What the model's last layer is moved towards. outputs: as every layer. logits: the original's
    # distributions of the next token, through the final norm and the head (target=sequential).
    last_layer: Literal["outputs", "logits"] = "outputs"


# What a preset sets where the config says nothing.
_PRESETS: dict[str, dict[str, Any]] = {
    "auto": {},
    "parallel": {},
    "thorough": {
        "target": "sequential",
        "held_out": 0.1,
        "solved_on": 32.0,
        "polish": {"steps": 1500, "last_layer": "logits"},
    },
}


Preset = Literal["parallel", "thorough"]
# Those that `auto` chooses from.
PRESETS: tuple[Preset, ...] = get_args(Preset)


class RefitConfig(Settings):
    """Needs the layer-input sample (`calibrate.sample`). Off: reduced experts stay as they are."""

    # parallel: every layer for itself. thorough: layer after layer towards the original residual
    # stream, the last one towards the original's distributions, 1,500 polish steps, a tenth of the
    # sample held out; many times the work, docs/reduction.md says what it brings.
    # auto: thorough where model and sample are of a size for it (orchestrator/sizing.py).
    preset: Literal["auto", "parallel", "thorough"] = "auto"
    # auto: with methods that narrow experts. Baselines are never refitted.
    enabled: bool | Literal["auto"] = "auto"
    # What a layer is fitted to (docs/reduction.md). original: its own outputs on its own inputs, so
    # that all layers run at once. sequential: the original residual stream, behind the reduced
    # layers before it, layer after layer. blockwise: the same, several layers at once.
    target: Literal["original", "blockwise", "sequential"] = "original"
    # Refitted layers of a block, with target=blockwise.
    block_layers: int = Field(default=4, gt=0)
    # Candidates for the ridge, in units of each expert's mean feature energy. The best on held-out
    # tokens is taken; if none of them beats leaving the weights alone, they are left alone.
    strengths: tuple[float, ...] = Field(default=(0.001, 0.01, 0.1, 1.0), min_length=1)
    # Share of the sample that chooses, in whole blocks of text.
    held_out: float = Field(default=0.2, gt=0, lt=1)
    # Largest number of unknown rows (experts x neurons) that is solved at once; beyond it experts
    # are solved one after another until nothing moves. The Gram matrix takes 8 times its square.
    joint_limit: int = Field(default=8192, ge=0)
    # Tokens of the sample per unknown row that the closed form is solved on; of more, evenly spread
    # ones are taken. Gradient steps, and second factors of U V + S, see all tokens whatever this
    # says. None: all.
    solved_on: float | None = Field(default=None, gt=0)
    polish: PolishConfig = PolishConfig()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """What is given counts before what the preset says."""
        if not isinstance(values, Mapping):
            return values
        preset = _PRESETS.get(str(values.get("preset", "auto")), {})
        found, polish = preset | dict(values), values.get("polish")
        steps = dict(preset.get("polish", {}))
        if found.get("target") != "sequential":
            steps.pop("last_layer", None)
        if steps and (polish is None or isinstance(polish, Mapping)):
            found["polish"] = steps | dict(polish or {})
        return found

    @model_validator(mode="after")
    def _last_layer(self) -> Self:
        """The original stream behind the last layer is known where it is carried, alone."""
        if self.polish.last_layer == "logits" and self.target != "sequential":
            raise ValueError("polish.last_layer=logits needs target=sequential")
        return self

    @model_serializer(mode="wrap")
    def _open(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """While the preset is not chosen, only what was given is told: the rest is the preset's."""
        found: dict[str, Any] = whole(self)
        if self.preset != "auto":
            return found
        given = {name: found[name] for name in sorted(self.model_fields_set) if name in found}
        if "polish" in given:
            given["polish"] = self.polish.model_dump(mode="json", exclude_unset=True)
        return {"preset": "auto"} | given

    def as_preset(self, preset: Preset) -> RefitConfig:
        """With a preset in place of `auto`, which what was given goes before."""
        return RefitConfig.model_validate(self.model_dump(mode="json") | {"preset": preset})

    def applies(self, narrows: bool) -> bool:
        """Whether a method is refitted, which `narrows` experts or does not."""
        return narrows if self.enabled == "auto" else self.enabled

    @property
    def together(self) -> int | None:
        """Layers refitted at once, behind all before them; None: every layer for itself."""
        sizes = {"original": None, "blockwise": self.block_layers, "sequential": 1}
        return sizes[self.target]
