"""Memory of one worker per stage, from headers alone: what `plan` shows and Ray reserves."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import samples
from orchestrator.preflight import (
    Prepared,
    expected_decisions,
    expected_layouts,
    student_layouts,
)
from stages.calibrate.config import Engine
from stages.corpus.overlap import BYTES_PER_TOKEN
from stages.export.layout import FileLayout
from stages.passage import KEPT_ARGUMENT_BYTES
from stages.recover.config import DeepSpeedConfig, RecoverConfig

# Resident memory of a worker that has imported torch and transformers and done nothing yet.
PROCESS_BYTES = 400_000_000


def verify(run: Prepared) -> int:
    """The largest tensor and its mask of finite values."""
    largest = max(info.nbytes for info in run.moe.checkpoint.tensors.values())
    return PROCESS_BYTES + 2 * largest


def corpus(run: Prepared) -> int:
    """Token lists as Python integers, and what evaluated documents are known by."""
    evaluate, dedup = run.config.evaluate, run.config.calibrate.dedup
    held = evaluate.data.tokens if evaluate else 0
    known = 0 if dedup.mode == "off" else held * (BYTES_PER_TOKEN + 4 * dedup.run)
    return PROCESS_BYTES + 64 * (run.config.calibrate.data.tokens + held) + known


def calibrate(run: Prepared, engine: Engine) -> int:
    """The model, a rank's part or a layer of it; the sums of all domains; one observed batch."""
    config = run.config.calibrate
    streamed = engine == "streaming"
    weights = _streamed_bytes(run, config.dtype) if streamed else _resident(run)
    sums = run.calibration_domains * statistics_bytes(run)
    # A shard's share of the sampled inputs, and once more while they are written.
    kept = 2 * len(run.moe.layers) * samples.layer_bytes(config, run.moe) // config.shards
    return PROCESS_BYTES + weights + sums + kept + _activations(run)


def inputs(run: Prepared) -> int:
    """The sampled inputs of one layer, in parts and joined."""
    return PROCESS_BYTES + 2 * samples.layer_bytes(run.config.calibrate, run.moe)


def subsample(run: Prepared) -> int:
    """One layer's inputs, one expert as stored and in fp32, outputs, a chunk, and all sums."""
    config, moe = run.config.calibrate, run.moe
    given = 3 * samples.layer_bytes(config, moe)
    expert = 3 * max(moe.expert_bytes(layer) for layer in moe.layers)
    sums = 2 * run.calibration_domains * samples.table_size(moe)
    return PROCESS_BYTES + given + expert + sums + samples.pair_bytes(config, moe)


def hidden_bytes(run: Prepared) -> int:
    """Hidden states of one shard, on disk while a worker streams it; padding not counted."""
    config, moe = run.config.calibrate, run.moe
    width = {"auto": 0, "float32": 4}.get(config.dtype, 2)
    width = width or -(-moe.checkpoint.nbytes // moe.checkpoint.parameters)
    return -(-config.data.tokens // config.shards) * moe.family.states * moe.hidden_size * width


def transform(run: Prepared) -> int:
    """The largest finished layer twice, one group of all experts, and fp64 sums of one expert."""
    moe = run.moe
    layouts = [each for variant in run.variants for each in expected_layouts(variant, moe)]
    layouts += [] if run.config.pruning is None else student_layouts(run)
    largest = max(each.tensor_bytes for each in layouts)
    expert = max(moe.expert_bytes(layer) for layer in moe.layers)
    reading = max(_refit(run), _alignment(run), _pooling(run))
    held = 2 * largest + (moe.num_experts + 8) * expert
    return PROCESS_BYTES + held + reading + _compress(run)


def _alignment(run: Prepared) -> int:
    """The sampled inputs of a layer, and the neurons of two experts and unit copies on them."""
    config, moe = run.config, run.moe
    if not config.align.watches:
        return 0
    sampled = samples.sampled_tokens(config.calibrate, moe)
    neurons = max(moe.meta_expert(layer).neurons for layer in moe.layers)
    inputs = 8 * sampled * moe.hidden_size
    return inputs + 16 * min(sampled, config.align.tokens) * neurons + 12 * neurons**2


def _pooling(run: Prepared) -> int:
    """The sampled inputs of a layer, and Gram matrices of the pooled neurons of one group: as many
    members as a group has if all are of one size."""
    config, moe = run.config, run.moe
    if config.merge.by != "neurons" or config.group.prunes or config.group.narrows:
        return 0
    kept = min(len(each.representatives) for each in expected_decisions(run.variants[0], moe))
    neurons = max(moe.meta_expert(layer).neurons for layer in moe.layers)
    pooled = -(-moe.num_experts // kept) * neurons
    tokens = samples.sampled_tokens(config.calibrate, moe)
    return 4 * 8 * pooled**2 + 8 * tokens * moe.hidden_size


def _compress(run: Prepared) -> int:
    """One matrix in fp32 with its singular vectors, or in fp64 with second moments; the sample."""
    config, moe = run.config.compress, run.moe
    if config is None:
        return 0
    one = [(moe.meta_expert(layer).neurons, moe.hidden_size) for layer in moe.layers]
    matrix = max(height * width for height, width in one)
    side = max(max(shape) for shape in one)
    tokens = samples.sampled_tokens(run.config.calibrate, moe) if config.needs_inputs else 0
    moments = 24 * side * side if config.whiten else 0
    return 40 * matrix + moments + 8 * tokens * side


def _refit(run: Prepared) -> int:
    """Inputs and targets, experts in float32 with what their gradient steps take, and the Gram."""
    method, config, moe = run.config.group, run.config.refit, run.moe
    if not config.applies(method.narrows) and not method.narrows:
        return 0
    tokens = samples.sampled_tokens(run.config.calibrate, moe)
    each = [moe.meta_expert(layer) for layer in moe.layers]
    values = max(sum(t.numel() for t in one.tensors().values()) for one in each) * moe.num_experts
    neurons = max(one.neurons for one in each)
    joint = min(moe.num_experts * neurons, config.joint_limit)
    copies = 20 if config.polish.steps else 4  # with their gradients and moments
    held = 28 * tokens * moe.hidden_size + copies * values + 32 * max(joint, neurons) ** 2
    return held + _distributions(run)


def _distributions(run: Prepared) -> int:
    """Where the last layer is polished towards distributions: all outside the layers in float32,
    one step's distributions with their gradients, and the original stream behind it."""
    config, moe = run.config.refit, run.moe
    if not config.polish.steps or config.polish.last_layer != "logits":
        return 0
    layer_of = moe.family.layer_of
    outside = [t for t in moe.checkpoint.tensors.values() if layer_of(t.name) is None]
    resident = sum(4 * t.meta().numel() for t in outside)
    vocabulary = int(moe.checkpoint.config["vocab_size"])
    tokens = samples.sampled_tokens(run.config.calibrate, moe)
    return resident + 24 * config.polish.batch * vocabulary + 12 * tokens * moe.hidden_size


def carry(run: Prepared) -> int:
    """What is outside the layers, one layer as read and in float32, arguments, one batch, and a
    part's share of the targets of one block."""
    config, moe = run.config, run.moe
    batch = config.calibrate.batch_size * config.calibrate.data.sequence_length
    neurons = moe.meta_expert(moe.layers[0]).neurons
    handed_on = moe.family.states * moe.hidden_size
    states = 4 * batch * (16 * handed_on + moe.top_k * (3 * neurons + moe.hidden_size))
    together = config.refit.together or 0
    kept = 16 * moe.hidden_size * samples.sampled_tokens(config.calibrate, moe) * together
    return PROCESS_BYTES + _streamed_bytes(run, "float32") + states + kept


def stream_bytes(run: Prepared) -> int:
    """One residual stream, with any momentum, of all sampled blocks of text, in float32.

    Padding is not counted. Every block of text is taken for sampled, as nearly all are where the
    sample is a few tokens of each.
    """
    return 4 * run.config.calibrate.data.tokens * run.moe.family.states * run.moe.hidden_size


def probe(run: Prepared) -> int:
    """The model, the logits of a batch, distributions of the probed text, and a reduced layer."""
    config = run.config.calibrate
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    logits = 4 * vocabulary * config.batch_size * config.data.sequence_length
    kept = 4 * vocabulary * run.config.probe.positions
    return transform(run) + _model_bytes(run, config.dtype) + 3 * logits + 3 * kept


def taught_bytes(run: Prepared) -> int:
    """What is kept of the teacher's predictions: ids, logarithms and the rest at every position."""
    config = run.config.recover
    if config is None or not config.alpha:
        return 0
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    kept = min(config.teacher.top or vocabulary, vocabulary)
    return (config.data or run.config.calibrate.data).tokens * (8 * kept + 4)


def teach(run: Prepared, engine: Engine) -> int:
    """The original, whole or by layers, the logits of a batch, and the predictions of a part."""
    config = run.config.recover
    if config is None:
        return 0
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    data = config.data or run.config.calibrate.data
    logits = 4 * vocabulary * config.teacher.batch_size * data.sequence_length
    part = 2 * taught_bytes(run) // config.teacher.shards
    held = _streamed_bytes if engine == "streaming" else _model_bytes
    return PROCESS_BYTES + held(run, config.teacher.dtype) + 5 * logits + part


def state_bytes(run: Prepared) -> int:
    """Trained values and two moments in fp32; everything counts as trained but for routers."""
    config = run.config.recover
    if config is None:
        return 0
    return 12 * _trained_values(run, config.mode)


def recover(run: Prepared) -> int:
    """One rank's share of values, gradients and moments, and the logits of a pass with their
    gradients. Measured by `benchmarks/recover_memory.py`."""
    config = run.config.recover
    if config is None:
        return 0
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    data = config.data or run.config.calibrate.data
    logits = 4 * vocabulary * config.micro_batch * data.sequence_length
    layouts = student_layouts(run)
    values = sum(each.parameters for each in layouts)
    largest = max(each.parameters for each in layouts)
    trained = _trained_values(run, config.mode)
    held = held_by_rank(config, values, trained, largest)
    # Whole gradients and values of S, of a matrix at a time and what they come to.
    pruned = 0 if run.config.pruning is None else 4 * trained
    return PROCESS_BYTES + held + pruned + 12 * logits


def held_by_rank(config: RecoverConfig, values: int, trained: int, largest: int) -> int:
    """Bytes of a rank: values as the model runs with them; values that are updated, gradients and
    moments in fp32; and a few layers, on their way from file to file, gathered, or in buckets."""
    passing = 32 * largest
    if not config.dealt_out:
        return 4 * values + 12 * trained + passing
    section, ranks = config.deepspeed or DeepSpeedConfig(), config.ranks
    width = 2 if section.bf16 else 4
    if section.zero_stage == 0:
        return 4 * values + 16 * trained + passing
    shared = -(-20 * trained // ranks)
    if section.zero_stage == 3:
        # A pass keeps what it has gathered until its gradients are made, unless layers pass again.
        kept = 0 if config.recomputes else width * values
        return -(-width * values // ranks) + shared + passing + kept
    # Flattened beside the values while they are wrapped; gradients of a whole pass later.
    return width * (values + trained) + shared + passing


def _trained_values(run: Prepared, mode: str) -> int:
    layouts, moe = student_layouts(run), run.moe
    routers = sum(
        moe.checkpoint.tensors[name].meta().numel()
        for layer in moe.layers
        for name in moe.router_names(layer)
    )
    if mode == "router":
        return routers
    return sum(each.parameters for each in layouts)


def export(run: Prepared, layouts: Sequence[FileLayout], engine: Engine = "resident") -> int:
    """The reload gate opens the output: all of it, or what is outside the layers and one layer."""
    if engine == "resident":
        return PROCESS_BYTES + sum(each.tensor_bytes for each in layouts)
    outside = sum(each.tensor_bytes for each in layouts if each.layer is None)
    return PROCESS_BYTES + outside + 2 * max(each.tensor_bytes for each in layouts)


def evaluate(run: Prepared, engine: Engine = "resident") -> int:
    """The original model, whole or by layers, and the logits of one batch."""
    config = run.config.evaluate
    if config is None:
        return 0
    vocabulary = int(run.moe.checkpoint.config["vocab_size"])
    logits = config.batch_size * config.data.sequence_length * vocabulary * 4
    streamed = engine == "streaming"
    weights = (_streamed_bytes if streamed else _model_bytes)(run, config.dtype)
    return PROCESS_BYTES + weights + 5 * logits


def evaluation_bytes(run: Prepared) -> int:
    """Hidden states of the largest domain, on disk while a worker streams a model over it.

    Domains are taken for equally large; padding is not counted.
    """
    config, moe = run.config.evaluate, run.moe
    if config is None:
        return 0
    width = {"auto": 0, "float32": 4}.get(config.dtype, 2)
    width = width or -(-moe.checkpoint.nbytes // moe.checkpoint.parameters)
    tokens = -(-config.data.tokens // max(run.evaluation_domains, 1))
    return tokens * moe.family.states * moe.hidden_size * width


def statistics_bytes(run: Prepared) -> int:
    """Statistics of one domain: key, nine scalars and three vectors of E for every expert."""
    experts = run.moe.num_experts
    return 8 * (12 + 3 * experts) * experts * len(run.moe.layers)


def human(count: float) -> str:
    """`1.4 GB`; decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _model_bytes(run: Prepared, dtype: str) -> int:
    """Bytes of the resident model in the type that it runs in."""
    width = {"auto": 0, "float32": 4}.get(dtype, 2)
    checkpoint = run.moe.checkpoint
    return checkpoint.parameters * width if width else checkpoint.nbytes


def _streamed_bytes(run: Prepared, dtype: str) -> int:
    """All outside the layers, the largest layer as it is read and as it is run, and arguments.

    A rank that streams its share meets this only once: a layer of each kind is compared whole.
    """
    by_layer: dict[int | None, int] = {None: 0}
    for info in run.moe.checkpoint.tensors.values():
        layer = run.moe.family.layer_of(info.name)
        by_layer[layer] = by_layer.get(layer, 0) + info.nbytes
    rest = by_layer.pop(None)
    largest = max(by_layer.values())
    wider = _model_bytes(run, dtype) / run.moe.checkpoint.nbytes
    return int((rest + largest) * wider) + largest + KEPT_ARGUMENT_BYTES


def _resident(run: Prepared) -> int:
    """Bytes of the weights that one calibrating process holds at its peak."""
    whole, ranks = _model_bytes(run, run.config.calibrate.dtype), run.config.executor
    if ranks.ranks_per_replica == 1:
        return whole
    moe = run.moe
    layers = [moe.num_experts * moe.expert_bytes(layer) for layer in moe.layers]
    # Its own experts, and for the self-check all experts of one layer.
    held = sum(layers) // ranks.ranks_per_replica + max(layers)
    return whole - (sum(layers) - held) * whole // moe.checkpoint.nbytes


def _activations(run: Prepared) -> int:
    """What one batch of one MoE layer takes while it is observed, with float64 copies."""
    config, moe = run.config.calibrate, run.moe
    tokens = config.batch_size * config.data.sequence_length
    neurons, hidden = moe.expert_infos(moe.layers[0])["up"].shape
    return tokens * (moe.top_k * (32 * hidden + 12 * neurons) + 32 * moe.num_experts)
