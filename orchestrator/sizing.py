"""What a config leaves to the size of the model: how thorough the refit is, and on how much text.

Decided by model and config alone, never by the machine, so that a run is the same wherever it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.moe import MoeCheckpoint
from orchestrator import samples
from orchestrator.compatibility import not_streamed
from orchestrator.config import RunConfig
from orchestrator.run_folder import RunFolder
from stages.calibrate.config import SAMPLED
from stages.refit.config import RefitConfig
from stages.unit import beside

# Operations of all gradient steps up to which a refit is thorough unasked: with all that comes with
# them half an hour of one core, as measured (docs/methods.md).
STEPS_FLOPS = 10**14
# Sampled tokens from which on it is.
TOKENS = 65_536
# Hidden states of one layer, float32, that it holds unasked, several times over.
HELD_BYTES = 512 << 20


@dataclass(frozen=True)
class Sizing:
    """A config without `auto` where the size of the model decides, and the reason in words."""

    config: RunConfig
    why: str


def sized(config: RunConfig, moe: MoeCheckpoint, folder: RunFolder) -> Sizing:
    """Settles `calibrate.sample.tokens` and `refit.preset`."""
    sample, refit = config.calibrate.sample, config.refit
    # The sample serves methods that come later, so that this one has no say in it.
    limit = _cannot_carry(config, moe, folder) or _work_limit(refit, moe)
    tokens = sample.count
    if sample.tokens == "auto":
        most = min(config.calibrate.data.tokens, HELD_BYTES // (4 * moe.hidden_size))
        tokens = most if limit is None and most >= TOKENS else SAMPLED
    calibrate = config.calibrate.model_copy(
        update={"sample": sample.model_copy(update={"tokens": tokens})}
    )
    found = samples.available_tokens(folder, calibrate, moe)
    why = limit or _token_limit(found, moe)
    if refit.preset == "auto":
        refit = refit.as_preset("thorough" if why is None else "parallel")
    reason = f"refit.preset={refit.preset}" if config.refit.preset != "auto" else _words(why, found)
    return Sizing(config.model_copy(update={"calibrate": calibrate, "refit": refit}), reason)


def step_flops(refit: RefitConfig, moe: MoeCheckpoint) -> int:
    """Of all gradient steps on all layers at full width, forwards and backwards, and of the head
    where the last layer is led to distributions."""
    values = [
        sum(t.numel() for t in moe.meta_expert(layer).tensors().values()) for layer in moe.layers
    ]
    each = 6 * moe.top_k * sum(values)
    if refit.polish.last_layer == "logits":
        each += 8 * int(moe.checkpoint.config.get("vocab_size") or 0) * moe.hidden_size
    return refit.polish.steps * refit.polish.batch * each


def _cannot_carry(config: RunConfig, moe: MoeCheckpoint, folder: RunFolder) -> str | None:
    """Why no layer can be refitted behind reduced ones; None: it can. See `check_target`."""
    reason = not_streamed(moe) or moe.family.behind_experts(moe.checkpoint.config)
    corpus = samples.observed(folder, config.calibrate).calibration_tokens
    if reason is None and config.calibrate.statistics is not None and not beside(corpus).exists():
        return f"there is no {corpus}"
    return reason


def _work_limit(refit: RefitConfig, moe: MoeCheckpoint) -> str | None:
    """Why a thorough refit is too much work to be done unasked; None: it is not."""
    work = step_flops(refit.as_preset("thorough"), moe)
    if work <= STEPS_FLOPS:
        return None
    return f"a thorough one takes {work:.1e} operations, more than {STEPS_FLOPS:.0e}"


def _token_limit(tokens: int, moe: MoeCheckpoint) -> str | None:
    if tokens < TOKENS:
        return f"{tokens:,} tokens are sampled, fewer than {TOKENS:,}"
    held = 4 * tokens * moe.hidden_size
    if held > HELD_BYTES:
        return f"the sample of a layer takes {held:,} bytes, more than {HELD_BYTES:,}"
    return None


def _words(why: str | None, tokens: int) -> str:
    if why is None:
        return f"thorough, layer after layer on {tokens:,} sampled tokens (refit.preset=auto)"
    return f"every layer for itself (refit.preset=auto): {why}"
