"""How much of S is left at every training step (MC-SMoE's cubic schedule; T, T_i and T_f there)."""

from __future__ import annotations


def kept_share(step: int, total: int, warmup: int, final: int, target: float) -> float:
    """Share of S that is kept at `step`: 1 during `warmup`, then a cubic fall to `target`.

    P(t) = P_T + (1 - P_T) (1 - (t - T_i) / (T - T_i - T_f))^3 for T_i <= t < T - T_f, and P_T in
    the `final` T_f steps. The paper prints t - T_i - T_f as the numerator, which starts above 1 and
    jumps at the end; this is the form of its code and of LoSparse (arXiv 2306.11222).

    Raises:
        ValueError: a target outside 0..1, or phases longer than `total`.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"the kept share must lie between 0 and 1, got {target}")
    if min(warmup, final) < 0 or warmup + final > total:
        raise ValueError(f"{warmup} + {final} steps of warm-up and end do not fit into {total}")
    if step >= total - final:
        return target
    if step <= warmup:
        return 1.0
    left = 1 - (step - warmup) / (total - warmup - final)
    return target + (1 - target) * left**3
