"""Our model against transformers' DeepseekV3ForCausalLM, on the same files in both directions, over random configs."""

import random
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher import load_model
from teacher.checkpoint import INDEX
from teacher.checkpoint_write import save_checkpoint
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.random_configs import random_config, randomize

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LOGITS = 1e-4  # of the largest logit, fp32
NEW_TOKENS = 16


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.abs().max() > 0.01
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def our_greedy(model, prompts_BT):
    ids_BT = prompts_BT
    for _ in range(NEW_TOKENS):
        ids_BT = torch.cat((ids_BT, model(ids_BT).logits[:, -1:].argmax(-1)), dim=1)
    return ids_BT[:, prompts_BT.shape[1] :]


def their_greedy(model, prompts_BT, new_tokens=NEW_TOKENS):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without a mask generate would take pad_token_id in a prompt for padding.
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        tokens = {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts_BT)}
        out_BT = model.generate(prompts_BT, do_sample=False, **lengths, **tokens)
    return out_BT[:, prompts_BT.shape[1] :]


def assert_parity(draw: int | random.Random, seed: int, folder: Path) -> Counter[str]:
    """One random model there and back: logits and greedy continuations are the same on both sides of both files.

    Returns what the config had in it.
    """
    config = random_config(draw)
    torch.manual_seed(seed)
    ours = load_model(config)
    randomize(ours, seed)
    # Half of what transformers keeps (it drops the MTP modules), so that there are two shards or more.
    kept = sum(parameter.numel() for parameter in ours.parameters()) * 4
    kept -= sum(parameter.numel() for module in ours.mtp_layers for parameter in module.parameters()) * 4
    shard_bytes = 2**40 if seed % 2 else kept // 2
    save_checkpoint(ours, folder / "ours", shard_bytes=shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
    theirs.save_pretrained(folder / "theirs", max_shard_size=shard_bytes)
    assert (folder / "ours" / INDEX).exists() == (folder / "theirs" / INDEX).exists() == (seed % 2 == 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no MTP weights")
        back = load_model(folder / "theirs")
    again = load_model(folder / "ours")
    ids_BT = torch.randint(0, config.vocab_size, (2, 100))
    prompts_BT = torch.randint(0, config.vocab_size, (3, 9))
    with torch.no_grad():
        expected_BTV = theirs(ids_BT).logits
        for model in (ours, again, back):
            assert relative_error(model(ids_BT).logits, expected_BTV) < LOGITS
    # The same in training, which takes other kernels on a CPU.
    assert relative_error(ours(ids_BT).logits.detach(), expected_BTV) < LOGITS
    expected = their_greedy(theirs, prompts_BT).tolist()
    assert our_greedy(again, prompts_BT).tolist() == expected
    assert our_greedy(back, prompts_BT).tolist() == expected
    # MTP weights, which transformers passes over here, make the way there and back as well.
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    rope = config.rope_scaling or {}
    drawn: dict[str, bool] = {
        "q_lora_rank": config.q_lora_rank is not None, "no q_lora_rank": config.q_lora_rank is None,
        "interleaved": config.rope_interleave, "halves": not config.rope_interleave,
        "YaRN": bool(rope), "YaRN with mscale": "mscale" in rope, "plain RoPE": not rope,
        "dense first": config.first_k_dense_replace > 0, "no dense": config.first_k_dense_replace == 0,
        "group limit": config.topk_group < config.n_group, "bias": config.attention_bias,
        "no MTP": config.num_nextn_predict_layers == 0, "MTP 1": config.num_nextn_predict_layers == 1,
        "MTP 2": config.num_nextn_predict_layers == 2, "shards": seed % 2 == 0, "one file": seed % 2 == 1,
        "unaligned experts": config.hidden_size % 8 + config.moe_intermediate_size % 8 > 0,
    }  # fmt: skip
    return Counter(feature for feature, present in drawn.items() if present)


@pytest.mark.parametrize("seed", range(20))
def test_parity_on_random_configs(seed, tmp_path):
    assert_parity(seed, seed, tmp_path)


@pytest.mark.slow
def test_parity_on_250_random_configs():
    drawn: Counter[str] = Counter()
    for seed in range(1000, 1250):
        with tempfile.TemporaryDirectory() as folder:
            try:
                drawn += assert_parity(seed, seed, Path(folder))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {random_config(seed)}") from error
    print(dict(drawn))
    assert len(drawn) == 17 and min(drawn.values()) >= 25


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False), seed=st.integers(0, 2**31))
def test_parity_on_configs_that_hypothesis_draws(draw, seed):
    """As above, but a failure is shrunk to the config nearest to the first choice everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        assert_parity(draw, seed, Path(folder))


def test_transformers_reads_bf16_with_its_fp32_bias(tmp_path):
    torch.manual_seed(0)
    ours = load_model(random_config(1))
    randomize(ours, 0)
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    biases = {name: tensor for name, tensor in theirs.named_buffers() if name.endswith("e_score_correction_bias")}
    assert biases
    for name, tensor in biases.items():
        assert torch.equal(tensor, ours.get_buffer(name))
    ids_BT = torch.randint(0, ours.config.vocab_size, (2, 30))
    with torch.no_grad():
        assert relative_error(load_model(tmp_path, "float32")(ids_BT).logits, theirs.float()(ids_BT).logits) < 1e-4


@pytest.mark.parametrize("seed", range(100, 104))
def test_we_read_what_transformers_writes(seed, tmp_path):
    fields = random_config(seed).to_dict()
    for name in ("architectures", "model_type", "num_nextn_predict_layers"):
        del fields[name]
    torch.manual_seed(seed)
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))
    randomize(theirs, seed)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no MTP weights"):
        ours = load_model(tmp_path)
    ids_BT = torch.randint(0, fields["vocab_size"], (2, 60))
    with torch.no_grad():
        assert relative_error(ours(ids_BT).logits, theirs(ids_BT).logits) < 1e-4


def test_gradients_equal_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = random_config(7)
    ours = load_model(config)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    ids_BT = torch.randint(0, config.vocab_size, (2, 40))
    for model in (ours, theirs):
        logits_BTV = model(ids_BT).logits
        torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == len(gradients)


@pytest.mark.parametrize("seed", [3, 5])
def test_the_engines_greedy_completions_are_identical(seed, tmp_path):
    torch.manual_seed(seed)
    config = random_config(seed)
    ours = load_model(config)
    randomize(ours, seed)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts_BT = torch.randint(4, config.vocab_size, (3, 9))
    requests = [
        Request(str(row), prompt.tolist(), temperature=0, max_tokens=40, stop_ids=[])
        for row, prompt in enumerate(prompts_BT)
    ]
    found = {completion.id: completion.token_ids for completion in Engine(ours, batch_size=2).generate(requests)}
    assert [found[str(row)] for row in range(3)] == their_greedy(theirs, prompts_BT, 40).tolist()
