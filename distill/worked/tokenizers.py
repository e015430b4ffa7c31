"""Tokenizers of the shipped tiny models: one token a digit, letter and sign, one token a word of the problem templates.

Small models need arithmetic and spelling at the level of single characters, and cannot afford sixty characters of
"State the final answer to the following ..." either. So the words that problem statements are made of are whole
tokens, looked up as in Llama 3 (`ignore_merges`), and everything else is split into characters. Any text encodes,
through bytes, and decodes to itself.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from distill.worked.corpus import WorkedProblems

_WORD_SHARE = 0.04
_WORD = re.compile(r" ?[A-Za-z]{2,}")

R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n<think>\\n' }}{% endif %}"
)
# name: special tokens (bos, eos, pad first, then the chat form's own), chat template
FORMS = {
    "tiny-r1": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"],
        R1_TEMPLATE,
    ),
    "tiny-qwen": (["<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|im_start|>"], QWEN_TEMPLATE),
    "tiny-llama": (
        ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        LLAMA_TEMPLATE,
    ),
}
_ROLES = ["user", "assistant", "system"]


def statement_words(problems: WorkedProblems, count: int = 14000) -> list[str]:
    """Words (with their leading space, where they have one) of the statements' templates, and all animals, sorted.

    A word counts where it stands in 4% of one family's statements: template words do, words to be spelled do not.
    """
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for index in range(count):
        family, statement = problems.statement(index)
        counts[family].update(set(_WORD.findall(statement)))
        totals[family] += 1
    words = {word for family in counts for word, n in counts[family].items() if n >= _WORD_SHARE * totals[family]}
    if "leg_counting" in totals:
        words.update(f" {part}" for name in ANIMALS for part in name.split())
    return sorted(words)


def build(name: str, words: list[str], folder: Path) -> None:
    """Write the tokenizer of one shipped model as a Hugging Face folder that AutoTokenizer loads.

    Raises UserError if `name` is no key of FORMS.
    """
    from transformers import PreTrainedTokenizerFast

    if name not in FORMS:
        raise UserError(f"name: no chat form is written for {name!r}; known: {', '.join(FORMS)}")
    special, template = FORMS[name]
    words = sorted({*words, *_ROLES, " answer", " is", "The", "boxed"})
    tokenizer = {"tiny-r1": _byte_level, "tiny-qwen": _qwen_form, "tiny-llama": _sentencepiece_like}[name](words)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=template,
    )
    # Not special: they are text that a reader and the filters must see (as in R1's tokenizer).
    wrapped.add_tokens(["<think>", "</think>"])
    wrapped.save_pretrained(folder)


def _splitter(words: list[str], space: str) -> str:
    """Regular expression of the pre-tokenizer: a known word that is not part of a longer one, else one character."""
    if not words:
        return r"[\s\S]"
    bare = sorted({word.strip() for word in words}, key=lambda word: (-len(word), word))
    return rf"{space}?(?<![A-Za-z])(?:{'|'.join(bare)})(?![A-Za-z])|[\s\S]"


def _byte_level(words: list[str]) -> Tokenizer:
    """GPT-2's bytes as characters, as Qwen and DeepSeek have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [word.replace(" ", "Ġ") for word in words]
    vocabulary = {piece: index for index, piece in enumerate([*characters, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_splitter(words, " ")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _qwen_form(words: list[str]) -> Tokenizer:
    """Bytes without merges, and the words as added tokens.

    transformers loads the tokenizer of any `qwen2` model with Qwen's own pre-tokenizer and plain merges, whatever
    tokenizer.json says. This one gives the same tokens either way. An added token also matches the beginning of a
    longer word, so the shortest words, which begin many, are left to their letters.
    """
    from tokenizers import AddedToken, normalizers

    tokenizer = _byte_level([])
    tokenizer.normalizer = normalizers.NFC()
    kept = [
        word for word in words if len(word.strip()) >= 3 and word.strip() not in ("ant", "bee", "cat", "cow", "dog")
    ]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in kept])
    return tokenizer


def _sentencepiece_like(words: list[str]) -> Tokenizer:
    """SentencePiece's form, as Llama 2 has it: spaces become `▁`, printable characters are pieces, the rest bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + characters + [word.replace(" ", "▁") for word in words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            ignore_merges=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_splitter(words, "▁")), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer
