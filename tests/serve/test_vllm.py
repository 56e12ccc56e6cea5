"""The plug-in in vLLM itself: answers are the model's. `make vllm` installs vLLM's CPU build and runs this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from btlm.checkpoint import BUNDLED_MODEL
from tests.model.tiny import tiny_model, tokens
from tests.serve.ask_vllm import NEW

pytest.importorskip("vllm.version")

PROMPTS = [tokens(1, length, seed)[0].tolist() for seed, length in enumerate((5, 17, 40))]
# Six heads, which are no power of two, of a size that vLLM has CPU kernels for; three of them on each of two devices.
SHAPE = {"n_embd": 192, "n_head": 6, "n_inner": 202}
SCALED = {"alibi_scaling": {"type": "linear", "factor": 2.5}}
LEARNED = {
    "position_embedding_type": "learned",
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
    "scale_attn_by_inverse_layer_idx": True,
    "mup_scale_qk_dot_by_d": False,
}


def pickle_in_shards(model, folder):
    """Write a folder as the released model is: pickled shards, with a copy of the tied head, and an index."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = sorted(state)
    shards = {f"pytorch_model-{i + 1:05}-of-00003.bin": names[i::3] for i in range(3)}
    for file, kept in shards.items():
        torch.save({name: state[name].clone() for name in kept}, folder / file)
    weight_map = {name: file for file, kept in shards.items() for name in kept}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def expected(model, prompt):
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        logits = model(ids).logits[0, :-1].float()
        scores = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0)
    return text[0, len(prompt) :].tolist(), scores


def ask(questions, folder):
    """Answers of vLLM, whose warnings are not this program's."""
    asked, answered = folder / "questions.json", folder / "answers.json"
    asked.write_text(json.dumps(questions))
    command = [sys.executable, str(Path(__file__).with_name("ask_vllm.py")), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"})
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(answered.read_text())


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Models by name, and the answers of vLLM to one question about each folder."""
    root = tmp_path_factory.mktemp("vllm")
    models = {
        "plain": tiny_model(**SHAPE),
        "scaled": tiny_model(**SHAPE, **SCALED),
        "learned": tiny_model(**SHAPE, **LEARNED),
    }
    questions = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        questions[name] = {"folder": str(root / name), "dtype": "float32", "prompts": PROMPTS}
    (root / "pickled").mkdir()
    pickle_in_shards(models["plain"], root / "pickled")
    questions["pickled"] = {**questions["plain"], "folder": str(root / "pickled")}
    models["pickled"] = models["plain"]
    questions["bfloat16"] = {**questions["plain"], "dtype": "bfloat16"}
    models["bfloat16"] = tiny_model(**SHAPE).to(torch.bfloat16)

    dynamic = json.loads((root / "plain/config.json").read_text())
    dynamic["alibi_scaling"] = {"type": "linear", "train_seq_len": 32}
    (root / "dynamic").mkdir()
    (root / "dynamic/config.json").write_text(json.dumps(dynamic))
    questions["dynamic"] = {**questions["plain"], "folder": str(root / "dynamic")}
    questions["quantized"] = {**questions["plain"], "folder": str(BUNDLED_MODEL)}
    questions["short"] = {**questions["plain"], "folder": str(root / "incomplete")}
    (root / "incomplete").mkdir()
    state = {name: tensor for name, tensor in models["plain"].state_dict().items() if name != "transformer.ln_f.bias"}
    models["plain"].config.save_pretrained(root / "incomplete")
    torch.save(state, root / "incomplete/pytorch_model.bin")
    answers = dict(zip(questions, ask(list(questions.values()), root), strict=True))
    return models, answers, root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "scaled", "learned", "pickled"])
def test_answers_in_fp32_are_those_of_the_model(asked, name):
    models, answers, _ = asked
    for i, prompt in enumerate(PROMPTS):
        text, scores = expected(models[name], prompt)
        assert answers[name]["texts"][i] == text
        torch.testing.assert_close(torch.tensor(answers[name]["scores"][i]), scores, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_scaling_changes_the_answers(asked):
    assert asked[1]["plain"]["scores"] != asked[1]["scaled"]["scores"]


@pytest.mark.slow
def test_bf16_rounds_no_more_than_the_model_in_bf16(asked):
    models, answers, _ = asked
    model = models["bfloat16"]
    rounded = torch.cat([expected(model, prompt)[1] for prompt in PROMPTS])
    model.float()  # the same weights
    exact = torch.cat([expected(model, prompt)[1] for prompt in PROMPTS])
    found = torch.cat([torch.tensor(scores) for scores in answers["bfloat16"]["scores"]])
    assert (found - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dynamic", "this interpolation changes with the length of the text"),
        ("quantized", "format of `btlm quantize`, which vLLM does not read"),
        ("short", "transformer.ln_f.bias is missing"),
    ],
)
def test_what_vllm_cannot_run_is_refused(asked, name, told):
    assert told in asked[1][name]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["devices", "pipeline"])
def test_two_devices_give_the_same_answers(asked, tmp_path, split):
    _, answers, root = asked
    question = {
        "folder": str(root / "scaled"),
        "dtype": "float32",
        "prompts": PROMPTS,
        split: 2,
        "compile": split == "pipeline",
    }
    (answer,) = ask([question], tmp_path)
    assert answer["texts"] == answers["scaled"]["texts"]
    for one, two in zip(answer["scores"], answers["scaled"]["scores"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-4)
