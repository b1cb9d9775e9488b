"""The mapped format computes the paper's inference rule and never opens a damaged checkpoint."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from models.errors import UnknownFamily
from models.mapped import modeling_coalesce, registration

EXPERTS, TOP_K, HIDDEN = 8, 2, 32
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]

# What differs between the tiny models. qwen3_moe has a dense layer 1; the flags for renormalised
# gates and tied embeddings are each on in some family and off in another.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 16, "num_hidden_layers": 2},
    "olmoe": {"intermediate_size": 16, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 24, "num_hidden_layers": 2},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True, "head_dim": 8},
}
# Stored experts by layer: a general number, and one that is smaller than top-k.
MERGED = {family: {0: 3, 2: 1} if family == "qwen3_moe" else {0: 3, 1: 1} for family in FAMILIES}


def base_config(family: str, **overrides: object) -> Any:
    common: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    fields = common | OVERRIDES[family] | overrides
    if family in ("mixtral", "olmoe"):
        del fields["moe_intermediate_size"]
    if family == "mixtral":
        del fields["num_experts"]
    stem = registration.families()[family]
    return getattr(transformers, f"{stem}Config")(**fields)


def model_class(family: str) -> Any:
    stem = registration.families()[family]
    return getattr(modeling_coalesce, f"Coalesce{stem}ForCausalLM")


def mapped_config(family: str, kept: dict[int, int], **overrides: object) -> Any:
    fields = registration.config_json(base_config(family, **overrides).to_dict(), kept)
    return model_class(family).config_class.from_dict(fields)


def mapped_model(family: str, kept: dict[int, int] | None = None, **overrides: object) -> Any:
    torch.manual_seed(7)
    kept = kept or MERGED[family]
    model = model_class(family)(mapped_config(family, kept, **overrides)).eval()
    for layer, block in blocks(model).items():
        onto = torch.randint(kept[layer], (EXPERTS,))
        onto[torch.randperm(EXPERTS)[: kept[layer]]] = torch.arange(kept[layer])
        block.experts.expert_map.copy_(onto)
    return model


def blocks(model: Any) -> dict[int, Any]:
    return {i: x.mlp for i, x in enumerate(model.model.layers) if hasattr(x.mlp, "experts")}


def expanded_model(mapped: Any, family: str) -> Any:
    """The family's own model with every slot holding the expert that the map sends it to."""
    state = mapped.state_dict()
    for name in [n for n in state if n.endswith("expert_map")]:
        expert_map = state.pop(name)
        for weight in ("gate_up_proj", "down_proj"):
            key = name.replace("expert_map", weight)
            state[key] = state[key][expert_map]
    overrides = {"num_hidden_layers": mapped.config.num_hidden_layers}
    config = base_config(family, **overrides)
    config._experts_implementation = mapped.config._experts_implementation
    stem = registration.families()[family]
    plain = getattr(transformers, f"{stem}ForCausalLM")(config)
    plain.load_state_dict(state)
    return plain.eval()


def slow_block(block: Any, x: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """sum_j (sum of the gates whose id maps to j) E_j(x), token by token. x [T, H]."""
    gates = F.softmax(F.linear(x, block.gate.weight).float(), dim=-1)
    top, ids = gates.topk(TOP_K, dim=-1)
    if renormalise:
        top = top / top.sum(-1, keepdim=True)
    experts = block.experts
    out = torch.zeros_like(x)
    for token, (weights, chosen) in enumerate(zip(top, ids, strict=True)):
        for j in range(experts.num_experts):
            share = weights[experts.expert_map[chosen] == j].sum()
            gate, up = (experts.gate_up_proj[j] @ x[token]).chunk(2)
            out[token] += share * (experts.down_proj[j] @ (F.silu(gate) * up))
    if hasattr(block, "shared_expert"):
        out += torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
    return out


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_map_is_the_plain_model_bit_for_bit(family: str, implementation: str) -> None:
    model = mapped_model(family, dict.fromkeys(MERGED[family], EXPERTS))
    for block in blocks(model).values():
        block.experts.expert_map.copy_(torch.arange(EXPERTS))
    model.set_experts_implementation(implementation)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
    assert torch.equal(model(IDS).logits, expanded_model(model, family)(IDS).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_block_equals_slow_oracle(family: str, implementation: str) -> None:
    model = mapped_model(family)
    model.set_experts_implementation(implementation)
    renormalise = family == "mixtral" or model.config.norm_topk_prob
    x = torch.randn(1, 6, HIDDEN)
    for block in blocks(model).values():
        expected = slow_block(block, x[0], renormalise)
        assert (block(x)[0] - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_expanded_model(family: str, implementation: str) -> None:
    model = mapped_model(family)
    model.set_experts_implementation(implementation)
    found = model(IDS, output_router_logits=True)
    expected = expanded_model(model, family)(IDS, output_router_logits=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    assert [list(z.shape) for z in found.router_logits] == [[IDS.numel(), EXPERTS]] * len(
        MERGED[family]
    )


@torch.no_grad()
def test_gates_of_duplicates_add_up() -> None:
    """Both chosen experts in one group: a single call with the summed gate."""
    block = blocks(mapped_model("mixtral"))[0]
    block.experts.expert_map.fill_(2)
    x = torch.randn(5, HIDDEN)
    two = block.experts(x, torch.tensor([[4, 6]] * 5), torch.tensor([[0.3, 0.7]] * 5))
    one = block.experts(
        hidden_states=x, top_k_index=torch.tensor([[4]] * 5), top_k_weights=torch.ones(5, 1)
    )
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_keeps_every_bit_and_name(family: str, tmp_path: Path) -> None:
    model = mapped_model(family)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(stored) == set(state) - tied
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    registration.register()
    registration.register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config is again.model.config and again.config.num_experts == EXPERTS
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    again.save_pretrained(tmp_path / "twice")
    assert load_file(tmp_path / "twice" / "model.safetensors").keys() == stored.keys()
    assert (tmp_path / "twice" / "modeling_coalesce.py").is_file()


@pytest.mark.slow
def test_fresh_process_needs_the_folder_only(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for family in FAMILIES:
        model = mapped_model(family)
        model.save_pretrained(checkpoints / family)
        with torch.no_grad():
            expected = {"ids": IDS, "logits": model(IDS).logits, **model.state_dict()}
        expected = {name: value.clone() for name, value in expected.items()}
        save_file(expected, checkpoints / family / "expected.st")
    script = """
        import sys, pathlib, torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        for folder in pathlib.Path(sys.argv[1]).iterdir():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            expected = load_file(folder / "expected.st")
            with torch.no_grad():
                assert torch.equal(model(expected["ids"]).logits, expected["logits"])
            state = model.state_dict()
            assert all(torch.equal(state[name], expected[name]) for name in state)
            print(type(model).__name__)
        assert not any(name == "models" or name.startswith("models.") for name in sys.modules)
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(script), str(checkpoints)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    names = {f"Coalesce{registration.families()[family]}ForCausalLM" for family in FAMILIES}
    assert set(run.stdout.split()) == names


MAP = "model.layers.0.mlp.experts.expert_map"
DOWN = "model.layers.0.mlp.experts.down_proj"
State = dict[str, torch.Tensor]


def drop(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(DOWN), f"missing {DOWN}"),
        (drop(MAP), f"missing {MAP}"),
        (drop("lm_head.weight"), "missing lm_head.weight"),
        (put("model.layers.0.mlp.surplus", torch.ones(1)), "unexpected model.layers.0.mlp.surplus"),
        (put(DOWN, torch.ones(4, HIDDEN, 16)), rf"{DOWN} has shape \[4, 32, 16\]"),
        (put(MAP, torch.zeros(EXPERTS - 1, dtype=torch.int64)), rf"{MAP} has shape \[7\]"),
        (put(MAP, torch.arange(EXPERTS)), "expert_map of layer 0 must be int64 and use each of"),
        (put(MAP, torch.arange(EXPERTS) % 3 - 1), r"found torch.int64 \[-1, 0, 1\]"),
        (put(MAP, torch.zeros(EXPERTS, dtype=torch.int64)), r"use each of 0..2"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(
    damage: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    mapped_model("mixtral").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        model_class("mixtral").from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong", [torch.arange(EXPERTS), (torch.arange(EXPERTS) % 3).int()])
def test_wrong_map_is_refused_by_load_state_dict(wrong: torch.Tensor) -> None:
    model = mapped_model("olmoe")
    with pytest.raises(ValueError, match="layer 0 must be int64"):
        model.load_state_dict(model.state_dict() | {MAP: wrong}, assign=True)


@pytest.mark.parametrize(
    ("kept", "message"),
    [({0: 3}, r"MoE layers are \[0, 2\]"), ({0: 3, 1: 2, 2: 1}, "names layers"), ({}, "names")],
)
def test_experts_per_layer_must_name_exactly_the_moe_layers(
    kept: dict[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_class("qwen3_moe")(mapped_config("qwen3_moe", kept))


@pytest.mark.parametrize("count", [0, EXPERTS + 1])
def test_experts_per_layer_must_lie_between_one_and_the_router_width(count: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.8"):
        model_class("mixtral")(mapped_config("mixtral", {0: count, 1: 1}))


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    options.setdefault("attention_mask", torch.ones_like(ids))
    found: torch.Tensor = model.generate(ids, generation_config=config, **options)
    return found[:, ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_cache_and_left_padding(family: str) -> None:
    model = mapped_model(family)
    alone = generate(model, IDS[:1, :5])
    assert torch.equal(alone, generate(model, IDS[:1, :5], use_cache=False))
    padded = torch.cat([F.pad(IDS[:1, :5], (4, 0)), IDS[1:]])
    together = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(together[:1], alone)
    assert torch.equal(together[1:], generate(model, IDS[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = mapped_model(family).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS, output_router_logits=True).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(value.isfinite().all() and value.any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_half_precision_keeps_the_map_intact(implementation: str, tmp_path: Path) -> None:
    model = mapped_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    half = model_class("qwen3_moe").from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation=implementation
    )
    experts = half.model.layers[0].mlp.experts
    assert experts.config._experts_implementation == implementation
    assert experts.down_proj.dtype == torch.bfloat16
    assert torch.equal(experts.expert_map, model.model.layers[0].mlp.experts.expert_map)
    expected = expanded_model(model, "qwen3_moe").to(torch.bfloat16)(IDS).logits
    torch.testing.assert_close(half(IDS).logits, expected, atol=0.1, rtol=0.1)


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor with memory that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_original_experts_are_never_allocated(family: str, tmp_path: Path) -> None:
    """With 64 experts and one stored, any fused tensor of all experts would be the largest."""
    wide = {"num_local_experts" if family == "mixtral" else "num_experts": 64}
    config = mapped_config(family, dict.fromkeys(MERGED[family], 1), **wide)
    with LargestTensor() as built:
        model = model_class(family)(config)
    model.save_pretrained(tmp_path)
    with LargestTensor() as loaded:
        model_class(family).from_pretrained(tmp_path)
    largest = max(p.numel() for p in model.parameters())
    assert largest <= 64 * HIDDEN  # embeddings and router; all experts would take 64 times 512
    assert 0 < built.numel <= largest and loaded.numel <= largest
    stored = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert stored == len(MERGED[family]) * 3 * 16 * HIDDEN
    assert model.num_experts == model.config.num_experts == 64


def test_config_json_keeps_the_router_width_and_names_the_layers() -> None:
    base = {"model_type": "qwen3_moe", "num_experts": 128, "auto_map": {"AutoConfig": "a.B"}}
    found = registration.config_json(base, {10: 4, 2: 6})
    assert found["num_experts"] == 128 and base["model_type"] == "qwen3_moe"
    assert list(found["experts_per_layer"].items()) == [("2", 6), ("10", 4)]
    assert found["auto_map"]["AutoConfig"] == "modeling_coalesce.CoalesceQwen3MoeConfig"
    assert found["architectures"] == ["CoalesceQwen3MoeForCausalLM"]


def test_config_json_refuses_other_families() -> None:
    with pytest.raises(UnknownFamily, match="llama"):
        registration.config_json({"model_type": "llama"}, {})


def test_registration_module_loads_no_torch() -> None:
    script = (
        "import sys; from models.mapped import registration as r;"
        "r.config_json({'model_type': 'olmoe'}, {0: 1}); r.modeling_source();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_modeling_file_is_self_contained() -> None:
    allowed = {"torch", "transformers"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(registration.modeling_source().read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed
    assert registration.families() == modeling_coalesce.FAMILIES
