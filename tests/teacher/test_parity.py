"""Our model against transformers' DeepseekV3ForCausalLM, on the same files, over random configs."""

import warnings

import pytest
import torch

from teacher import load_model
from teacher.engine import Engine
from teacher.requests import Request
from tests.teacher.random_configs import random_config, randomize

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.abs().max() > 0.01
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", range(20))
def test_transformers_reads_what_we_write(seed, tmp_path):
    torch.manual_seed(seed)
    ours = load_model(random_config(seed))
    randomize(ours, seed)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids_BT = torch.randint(0, ours.config.vocab_size, (2, 100))
    with torch.no_grad():
        expected_BTV = theirs(ids_BT).logits
        assert relative_error(ours(ids_BT).logits, expected_BTV) < 1e-4
        assert relative_error(load_model(tmp_path)(ids_BT).logits, expected_BTV) < 1e-4
    # The same in training, which takes other kernels on a CPU.
    assert relative_error(ours(ids_BT).logits.detach(), expected_BTV) < 1e-4


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
def test_greedy_continuations_are_identical(seed, tmp_path):
    torch.manual_seed(seed)
    config = random_config(seed)
    ours = load_model(config)
    randomize(ours, seed)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = torch.randint(4, config.vocab_size, (3, 9))
    requests = [
        Request(str(row), prompt.tolist(), temperature=0, max_tokens=40, stop_ids=[])
        for row, prompt in enumerate(prompts)
    ]
    found = {completion.id: completion.token_ids for completion in Engine(ours, batch_size=2).generate(requests)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(
            prompts, do_sample=False, max_new_tokens=40, min_new_tokens=40, eos_token_id=None, pad_token_id=0
        )
    assert [found[str(row)] for row in range(3)] == expected[:, 9:].tolist()
