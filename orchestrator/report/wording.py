"""Numbers and names as people read them. `None` is a dash, a non-finite number says so."""

import math
from typing import Any

MISSING = "\N{EN DASH}"
FAMILIES = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "olmoe": "OLMoE",
    "phimoe": "Phi-MoE",
    "gpt_oss": "gpt-oss",
    "minimax": "MiniMax-01",
    "minimax_m2": "MiniMax-M2",
    "qwen3_next": "Qwen3-Next",
    "glm4_moe": "GLM-4.5",
    "ernie4_5_moe": "ERNIE 4.5",
    "hunyuan_v1_moe": "Hunyuan",
    "afmoe": "AFMoE",
    "lfm2_moe": "LFM2-MoE",
    "jamba": "Jamba",
    "granitemoe": "Granite MoE",
    "switch_transformers": "Switch Transformers",
    "nllb-moe": "NLLB-MoE",
}
ACRONYMS = {"reap": "REAP", "ean": "EAN", "loo": "LOO"}


def as_float(value: Any) -> float | None:
    """The number, or None where there is none; booleans and text are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def finite(value: Any) -> float | None:
    number = as_float(value)
    return number if number is not None and math.isfinite(number) else None


def _guard(value: Any) -> str | None:
    number = as_float(value)
    if number is None:
        return MISSING
    return None if math.isfinite(number) else "not finite"


def perplexity(value: Any) -> str:
    return _guard(value) or _scaled(float(value))


def _scaled(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0
    return f"{value:,.{digits}f}"


def decimal(value: Any, digits: int = 3) -> str:
    return _guard(value) or f"{float(value):,.{digits}f}"


def significant(value: Any) -> str:
    return _guard(value) or f"{float(value):.4g}"


def nats(value: Any) -> str:
    """A rise (or fall) of the log-perplexity, always with its sign."""
    return _guard(value) or f"{float(value):+.3f}".replace("-", "\N{MINUS SIGN}")


def count(value: Any) -> str:
    return _guard(value) or f"{float(value):,.0f}"


def percent(ratio: Any) -> str:
    guard = _guard(ratio)
    if guard:
        return guard
    share = 100 * float(ratio)
    return f"{share:.1f} %" if 0 < share < 10 or 99 <= share < 100 else f"{share:.0f} %"


def size(value: Any) -> str:
    """Bytes in decimal units, as file managers and model hubs print them."""
    guard = _guard(value)
    if guard:
        return guard
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(amount) < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.{_digits(amount)}f} {unit}"
        amount /= 1000
    return f"{amount:.2f} TB"


def _digits(amount: float) -> int:
    return 1 if abs(amount) < 100 else 0


def duration(seconds: Any) -> str:
    guard = _guard(seconds)
    if guard:
        return guard
    value = float(seconds)
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def family(name: Any) -> str:
    return FAMILIES.get(str(name), str(name)) if name else "Model"


def baseline(name: str) -> str:
    return ACRONYMS.get(name.lower(), name)


def domain(name: str) -> str:
    return name.replace("_", " ")


def clip(text: str, width: int = 26) -> str:
    """One line that fits a figure label."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
