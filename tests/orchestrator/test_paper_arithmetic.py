"""The sizes and FLOPs of arXiv 2310.01334, table 2, from config.json alone by what plans a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.moe import MoeCheckpoint
from orchestrator.absolute import absolute
from orchestrator.commands.plan import standing_in
from orchestrator.flops import attention, parameters, per_token
from orchestrator.load import load
from orchestrator.plan import summary
from orchestrator.preflight import Prepared, described, expected_decisions, expected_layouts
from stages.compress.config import CompressConfig
from stages.export.layout import placeholder
from stages.group.decision import LayerDecision
from tests.tiny_seq2seq import save_seq2seq, seq2seq_model

REPOSITORY = Path(__file__).resolve().parents[2]
FULL, MERGED, SMALL = 2.0e9, 733e6, 381e6
ROUNDING = (3.825 / 4.655, 3.835 / 4.645)  # what "4.65 -> 3.83" may stand for


@dataclass(frozen=True)
class Planned:
    """What `coalesce plan --config-only` has in its hands."""

    run: Prepared
    decisions: list[LayerDecision]

    def values(self) -> list[int]:
        """Of the original, the merged model and the decomposed one."""
        moe = self.run.moe
        merged = parameters(moe, self.decisions)
        return [parameters(moe), merged, parameters(moe, self.decisions, self.run.config.compress)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Planned]]:
    """The two plans of examples/plans."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        found = {}
        for name in ("switch-base-32", "mixtral-8x7b"):
            config = absolute(load(f"examples/plans/{name}.yaml").config)
            folder = tmp_path_factory.mktemp(name)
            config = config.model_copy(update={"run_dir": folder / "run"})
            run = described(stack.enter_context(standing_in(config)))
            found[name] = Planned(run, expected_decisions(run.variants[0], run.moe))
        yield found


@pytest.mark.slow
def test_sizes_of_switch_base_32(planned: dict[str, Planned]) -> None:
    """Assumed: the first sparse layer stays whole, every other one keeps 8 of 32; both matrices of
    all distinct experts have rank 32 and a tenth of the rows of S, whose zeros are not counted."""
    full, merged, small = planned["switch-base-32"].values()

    assert full == 1_978_514_688 == pytest.approx(FULL, rel=0.02)
    assert [round(each / 1e6) for each in (merged, small)] == [MERGED / 1e6, SMALL / 1e6]
    assert 1 - small / full == pytest.approx(0.807, abs=1e-3)  # "up to 80 % memory"


@pytest.mark.slow
def test_flops_of_switch_base_32(planned: dict[str, Planned]) -> None:
    """4.65 -> 3.83 TFLOPs is a factor of 0.8237. The paper does not say for how many tokens.

    Products with weights alone give 0.8028 for one token of the source and one of the target (and
    between 0.798 and 0.806 for any other mix). Attention scores, which stay, make up the rest: with
    477 tokens of source and of target it is the printed factor, and the rounding of the two numbers
    allows 428 to 528. T5's customary 512 lies in that range.
    """
    run, decisions = planned["switch-base-32"].run, planned["switch-base-32"].decisions
    before, after = per_token(run.moe), per_token(run.moe, decisions, run.config.compress)

    def factor(length: int) -> float:
        scores = attention(run.moe, length)
        return (after + scores) / (before + scores)

    assert per_token(run.moe, decisions) == before  # merging alone saves none
    assert factor(0) == pytest.approx(0.8028, abs=5e-4)
    assert factor(477) == pytest.approx(3.83 / 4.65, abs=1e-4)
    inside = [n for n in (427, 428, 512, 528, 529) if ROUNDING[0] <= factor(n) <= ROUNDING[1]]
    assert inside == [428, 512, 528]
    assert 4.65 * factor(512) == pytest.approx(3.83, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("switch-base-32", ["values: 1,979 M -> 733 M merged, each expert once -> 381 M with U V"]),
        (
            "mixtral-8x7b",
            [
                "32 MoE layers of 8 experts, top-2: 93.4 GB -> 19.0 GB (20.4%)",
                "values: 46,703 M -> 24,154 M merged, each expert once -> 9,518 M with U V + S",
                "25.5 -> 10.9 GFLOP per token",
            ],
        ),
    ],
)
def test_plan_prints_it(planned: dict[str, Planned], name: str, wanted: list[str]) -> None:
    text = " ".join(summary(planned[name].run).split())
    assert [each for each in wanted if each not in text] == [], text


@pytest.mark.slow
def test_bytes_of_mixtral_are_its_values(planned: dict[str, Planned]) -> None:
    """Two bytes each, an index of eight per kept row, the maps, and headers."""
    mixtral = planned["mixtral-8x7b"]
    layouts = expected_layouts(mixtral.run.variants[0], mixtral.run.moe)

    values = mixtral.values()[2]
    assert sum(each.parameters for each in layouts) == values
    indices = 32 * (4 * (2 * 1432 + 408) + 8)
    assert sum(each.tensor_bytes for each in layouts) == 2 * values + 8 * indices


def test_an_encoder_decoder_costs_what_torch_counts(tmp_path: Path) -> None:
    """One token of the source and one of the target; products with weights, and with attention."""
    name, length = "SwitchTransformers", 12
    moe = MoeCheckpoint.open(save_seq2seq(tmp_path, name))
    model = seq2seq_model(name)
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    scores = sum(n for kind, n in counts.items() if "bmm" in str(kind) or "attention" in str(kind))

    assert (sum(counts.values()) - scores) / length == per_token(moe)
    assert scores / length == attention(moe, length)


def test_experts_as_factors_cost_their_values(tmp_path: Path) -> None:
    moe = MoeCheckpoint.open(save_seq2seq(tmp_path, "SwitchTransformers"))
    whole = placeholder(moe, dict.fromkeys(moe.layers, moe.num_experts))
    config = CompressConfig(rank=2, sparse=0.25)
    saved = per_token(moe, whole) - per_token(moe, whole, config)
    # 32 x 16 and 16 x 32, rank 2, 8 or 4 rows.
    each = 2 * 32 * 16 - 2 * 2 * 48 - 4 * 32 - 8 * 16
    assert saved == 2 * len(moe.layers) * each
    assert parameters(moe) - parameters(moe, whole, config) == 4 * len(moe.layers) * each
