"""One domain of the bundled text, and a tokenizer of its own, for models that learn it soon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED = REPOSITORY / "examples" / "bundled"
# Written in words that spaces separate, with few of them: a small model learns it soonest. Word
# pairs counted in its training split give about 500 of perplexity per word on held-out text.
DOMAIN = "scripture"
VOCABULARY = 4096
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3, as the bundled tokenizer has them


def documents(split: str) -> list[str]:
    """All texts of the domain in `calibration`, `validation` or `test`, in order of the file."""
    import pyarrow.parquet as pq

    table = pq.read_table(BUNDLED / "data" / f"{split}.parquet").to_pydict()
    pairs = zip(table["text"], table["domain"], strict=True)
    return [text for text, domain in pairs if domain == DOMAIN]


def held_out(split: str, characters: int) -> list[str]:
    """The first documents of a split, so many characters in all; the last is cut."""
    return list(_until(documents(split), characters))


def _until(texts: list[str], left: int) -> Iterator[str]:
    for text in texts:
        if left > 0:
            yield text[:left]
            left -= len(text)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the training split; seven of its tokens are about five words."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    # tokenizers lets these be set, and its stubs do not.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = Decoder()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents("calibration"), trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
