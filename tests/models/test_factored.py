"""Experts stored as U V + S: opened exactly, run in that form, and refused where damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from models.factored import Factored
from models.mapped import registration
from models.mapped.modeling_coalesce import _grouped_linear
from models.moe import MoeCheckpoint
from stages.compress.config import CompressConfig
from stages.export.config import ExportConfig
from stages.export.layout import file_layouts
from stages.group.decision import LayerDecision, from_labels
from tests.models.test_mapped import LargestTensor
from tests.tiny import HIDDEN, WIDTH, compress, logits_of, open_model, random_ids, save_tiny

WEIGHT = [0.4, 0.1, 0.2, 0.1, 0.1, 0.1]
IDS = random_ids(2, 9)
# Ranks and kept rows of whole 16 bytes, which the grouped kernel takes, others, and no S at all.
CONFIGS = {
    "aligned": CompressConfig(rank=8, sparse=0.25),
    "odd": CompressConfig(rank=3, sparse=0.2),
    "columns": CompressConfig(rank=3, sparse=0.2, axis="columns"),
    "no S": CompressConfig(rank=4, sparse=0.0, skip_layers=(1,)),
    "all of S": CompressConfig(rank=1, sparse=1.0),
}


class Written:
    """A merged model in the mapped format with decomposed experts, and the expanded one."""

    def __init__(self, root: Path, name: str, dtype: torch.dtype) -> None:
        self.moe = MoeCheckpoint.open(save_tiny(root / "model", "mixtral", dtype))
        self.decisions = decisions(self.moe)
        self.config, self.root = CONFIGS[name], root
        self.small, self.plain = (self.folder(form) for form in ("mapped", "expanded"))

    def folder(self, form: Any) -> Path:
        export = ExportConfig(format=form, compress=self.config)
        return compress(self.moe, self.decisions, self.root / form, export)


def decisions(moe: MoeCheckpoint) -> list[LayerDecision]:
    """3 experts in the first layer; one, fewer than top-k, in the last."""
    first, last = moe.layers
    return [from_labels(first, [0, 2, 2, 0, 4, 4], WEIGHT), from_labels(last, [3] * 6, WEIGHT)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    registration.register()

    @cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> Written:
        return Written(tmp_path_factory.mktemp("factored"), name, dtype)

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_the_written_out_experts_do(
    name: str, written: Callable[..., Written]
) -> None:
    found = written(name)

    small, plain = (logits_of(open_model(folder), IDS) for folder in (found.small, found.plain))

    torch.testing.assert_close(small, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["aligned", "odd"])
def test_half_precision(name: str, written: Callable[..., Written]) -> None:
    found = written(name, torch.bfloat16)
    small = open_model(found.small)
    experts = small.model.layers[0].mlp.experts

    assert experts.up_proj.u.dtype == torch.bfloat16
    assert experts.up_proj.index.dtype == torch.int64
    logits = logits_of(small, IDS)
    assert logits.dtype == torch.bfloat16
    exact = logits_of(open_model(found.small).float(), IDS)
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_the_arithmetic(name: str, written: Callable[..., Written]) -> None:
    found = written(name)
    config, export = found.config, ExportConfig(format="mapped", compress=CONFIGS[name])
    files = sorted((found.root / "mapped" / "layers").glob("*.safetensors"))

    layouts = file_layouts(found.moe, found.decisions, export)

    assert [each.file_bytes for each in layouts] == [path.stat().st_size for path in files]
    rank = config.rank or 0
    per_expert = 3 * rank * (HIDDEN + WIDTH)
    for height, width in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        along, across = (height, width) if config.axis == "rows" else (width, height)
        per_expert += int(config.sparse * along + 0.5) * (across + 2)  # an index is two floats
    stored = load_file(found.small / "model.safetensors")
    for decision in found.decisions:
        experts = f"model.layers.{decision.layer}.mlp.experts."
        sizes = [
            t.nbytes for n, t in stored.items() if n.startswith(experts) and "expert_map" not in n
        ]
        whole = decision.layer in config.skip_layers
        each = 3 * HIDDEN * WIDTH if whole else per_expert
        assert sum(sizes) == 4 * each * len(decision.representatives)


def test_a_block_equals_the_slow_way(written: Callable[..., Written]) -> None:
    """Token by token and expert by expert, with S scattered into a whole matrix."""
    experts = open_model(written("odd").small).model.layers[0].mlp.experts
    x, generator = torch.randn(7, HIDDEN), torch.Generator().manual_seed(1)
    ids = torch.randint(6, (7, 2), generator=generator)
    gates = torch.rand(7, 2, generator=generator)

    with torch.no_grad():
        found = experts(x, ids, gates)

    def matrix(part: Any, expert: int) -> torch.Tensor:
        return Factored(part.u[expert], part.v[expert], part.index[expert], part.s[expert]).dense()

    expected = torch.zeros_like(x)
    with torch.no_grad():
        for t in range(7):
            for slot in range(2):
                e = int(experts.expert_map[ids[t, slot]])
                up, gate = (matrix(p, e) @ x[t] for p in (experts.up_proj, experts.gate_proj))
                expected[t] += gates[t, slot] * (matrix(experts.down_proj, e) @ (F.silu(gate) * up))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_ids_that_meet_in_one_expert_are_computed_once(written: Callable[..., Written]) -> None:
    experts = open_model(written("odd").small).model.layers[0].mlp.experts
    x, rows = torch.randn(5, HIDDEN), []
    hook = experts.down_proj.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))

    with torch.no_grad():
        two = experts(x, torch.tensor([[1, 2]] * 5), torch.tensor([[0.3, 0.5]] * 5))
        one = experts(x, torch.tensor([[1]] * 5), torch.full((5, 1), 0.8))

    hook.remove()
    assert rows == [5, 5]
    torch.testing.assert_close(two, one)


@pytest.mark.parametrize("width", [8, 3])
@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [0, 7, 0], [1, 1, 1]])
def test_grouped_products_equal_a_loop(width: int, counts: list[int]) -> None:
    """With the kernel (8 columns) and padded (3 columns); gradients too."""
    x = torch.randn(sum(counts), width, requires_grad=True)
    weight = torch.randn(3, 8, width, requires_grad=True)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)

    found = _grouped_linear(x, weight, ends)

    parts = [part @ w.T for part, w in zip(x.split(counts), weight, strict=True)]
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected)
    for made, wanted in zip(
        torch.autograd.grad((found * found).sum(), (x, weight), allow_unused=True),
        torch.autograd.grad((expected * expected).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(torch.zeros_like(wanted) if made is None else made, wanted)


@torch.no_grad()
def test_generation_with_cache_and_left_padding(written: Callable[..., Written]) -> None:
    model = open_model(written("odd").small)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)

    def generate(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        options = {"attention_mask": (ids != 0).long()} | options
        return model.generate(ids, generation_config=config, **options)[:, ids.shape[1] :]

    alone = generate(IDS[:1, :5])
    assert alone.equal(generate(IDS[:1, :5], use_cache=False))
    padded = torch.cat([F.pad(IDS[:1, :5], (4, 0)), IDS[1:]])
    assert generate(padded)[:1].equal(alone)


@pytest.mark.parametrize("name", ["aligned", "columns"])
def test_gradient_checkpointing_gives_the_same_gradients(
    name: str, written: Callable[..., Written]
) -> None:
    model = open_model(written(name).small).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(value.isfinite().all() and value.any() for value in plain.values())
    for name_, value in plain.items():
        torch.testing.assert_close(checkpointed[name_], value, msg=name_)


def test_round_trip_keeps_every_bit_and_name(
    written: Callable[..., Written], tmp_path: Path
) -> None:
    before = load_file(written("columns").small / "model.safetensors")

    open_model(written("columns").small).save_pretrained(tmp_path)

    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert logits_of(open_model(tmp_path), IDS).equal(
        logits_of(open_model(written("columns").small), IDS)
    )


EXPERTS = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("up_proj.v", None, "missing .*up_proj.v"),
        ("down_proj.s", None, "missing .*down_proj.s"),
        ("gate_proj.index", None, "missing .*gate_proj.index"),
        ("gate_up_proj", lambda _: torch.ones(3, 32, 32), "unexpected .*gate_up_proj"),
        ("up_proj.u", lambda t: t[:, :, 1:], "up_proj.u has shape"),
        ("up_proj.index", lambda t: t + 16, r"index of up_proj in layer 0 .* 0\.\.15"),
        ("up_proj.index", lambda t: t.flip(1), "must be int64, ascend"),
        ("down_proj.index", lambda t: t.clamp(max=1), "must be int64, ascend"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    name: str,
    change: Callable[[torch.Tensor | None], torch.Tensor] | None,
    message: str,
    written: Callable[..., Written],
    tmp_path: Path,
) -> None:
    source = written("odd").small
    state = load_file(source / "model.safetensors")
    found = state.pop(EXPERTS + name, None)
    if change is not None:
        state[EXPERTS + name] = change(found).contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())

    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_whole_experts_are_never_allocated(tmp_path: Path) -> None:
    """Experts are by far the largest tensors, and no tensor of their size is ever made."""
    registration.register()
    folder = save_tiny(tmp_path / "model", "mixtral", intermediate_size=256)
    moe = MoeCheckpoint.open(folder)
    merged = [from_labels(layer, [0, 0, 0, 3, 3, 3], WEIGHT) for layer in moe.layers]
    export = ExportConfig(format="mapped", compress=CompressConfig(rank=4, sparse=0.05))
    small = compress(moe, merged, tmp_path / "small", export)

    with LargestTensor() as loaded:
        model = AutoModelForCausalLM.from_pretrained(small)

    assert 0 < loaded.numel <= max(t.numel() for t in model.state_dict().values())
    assert loaded.numel < 256 * HIDDEN  # one matrix of one expert


@pytest.mark.slow
def test_the_folder_alone_opens_it(written: Callable[..., Written], tmp_path: Path) -> None:
    """A fresh process without Coalesce, by the modeling file beside the weights."""
    source, folder = written("odd").small, tmp_path / "model"
    open_model(source).save_pretrained(folder)
    save_file({"logits": logits_of(open_model(source), IDS), "ids": IDS}, tmp_path / "expected.st")
    script = """
        import sys, torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        expected = load_file(sys.argv[2])
        with torch.no_grad():
            found = model(expected["ids"], use_cache=False).logits
        assert torch.equal(found, expected["logits"])
        assert not any(name.split(".")[0] in ("models", "stages") for name in sys.modules)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-I", "-c", textwrap.dedent(script), folder, tmp_path / "expected.st"]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
