"""Small random models and a byte tokenizer, so that no test needs a download or the shipped weights.

tokenizer()                  a byte-level tokenizer with DeepSeek-R1's chat form
deepseek_config(**changes)   a DeepSeek-V3 config of about 80k parameters
write_teacher(folder)        random DeepSeek-V3 model + tokenizer as a Hugging Face folder
write_qwen(folder), write_llama(folder)   random dense students + tokenizer, likewise
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from teacher.config import DeepseekV3Config

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# As R1's: the generation prompt opens the reasoning; an assistant turn in the history loses its reasoning.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% else %}" + ASSISTANT + "{{ message['content'].split('</think>')[-1] }}" + EOS + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "<think>\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then the special tokens; `<think>` and `</think>` are plain added tokens. 263 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in (BOS, EOS, PAD, USER, ASSISTANT)])
    backend.add_tokens([AddedToken(t, special=False) for t in ("<think>", "</think>")])
    # unk_token: a Qwen2 folder loads as Qwen2Tokenizer, which adds "<|endoftext|>" to the vocabulary if none is named.
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def deepseek_config(**changes: Any) -> DeepseekV3Config:
    """A DeepSeek-V3 config with everything in it: q_lora, groups, a dense first layer, a shared expert, MTP, YaRN."""
    from teacher.config import DeepseekV3Config

    fields: dict[str, Any] = {
        "vocab_size": 263, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "n_shared_experts": 1,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "max_position_embeddings": 512, "num_nextn_predict_layers": 1, "initializer_range": 0.2,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }  # fmt: skip
    return DeepseekV3Config(**(fields | changes))


def write_teacher(folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random teacher with its tokenizer; returns the folder."""
    import torch

    from teacher import load_model

    torch.manual_seed(seed)
    load_model(deepseek_config(**changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)


def write_qwen(folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random Qwen2 base (GQA, tied embeddings) with a tokenizer; returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _write_student(Qwen2ForCausalLM, Qwen2Config, folder, seed, {"tie_word_embeddings": True} | changes)


def write_llama(folder: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random Llama base (GQA, untied embeddings) with a tokenizer; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _write_student(LlamaForCausalLM, LlamaConfig, folder, seed, {"tie_word_embeddings": False} | changes)


def _write_student(model_class: Any, config_class: Any, folder: str | Path, seed: int, changes: dict[str, Any]) -> Path:
    import torch

    fields: dict[str, Any] = {
        "vocab_size": 263, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    torch.manual_seed(seed)
    model_class(config_class(**(fields | changes))).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Path(folder)
