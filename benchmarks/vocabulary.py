"""A byte-level BPE tokenizer of any size, made here and now from Python's own library: no download."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHARACTERS = 12_000_000
_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}<|turn|>assistant\n"
)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `size` tokens, with a chat template; takes some seconds."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*sorted(library.glob("*.py")), *sorted(library.glob("[a-r]*/**/*.py"))]
    texts, length = [], 0
    for file in files:
        texts.append(file.read_text(encoding="utf-8", errors="ignore"))
        length += len(texts[-1])
        if length > _CHARACTERS:
            break
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=_TEMPLATE
    )
