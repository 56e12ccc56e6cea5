import io
import shutil
import sys
from typing import Any

import pytest
import torch

from btlm.engine import GenerationOptions
from btlm.errors import NotSupported
from btlm.generate.continue_prompt import run_generate
from tests.checkpoint.tiny import byte_tokenizer, save_tiny, set_config, tiny_model

SHORT = GenerationOptions(max_new_tokens=6)


@pytest.fixture
def standard_input(monkeypatch):
    def give(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return give


def continuation(prompt, model=None, length=6):
    """Continuation through Transformers' own interface."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    network: Any = model or tiny_model()
    output = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=256
    )
    return prompt + tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_standard_output_has_the_text_and_nothing_else(checkpoint, capsys):
    run_generate(["Once", "upon", "a", "time"], model=checkpoint, options=SHORT, device="cpu")
    out, err = capsys.readouterr()
    assert out == continuation("Once upon a time")
    first, second = err.splitlines()
    assert first.startswith(f"btlm: {checkpoint.name}, 24,112 parameters, float32 on cpu (")
    assert second.startswith("btlm: 16 prompt tokens, 6 new (first after ")
    assert second.endswith("; stopped at max_new_tokens")


@pytest.mark.parametrize("words", [(), ("-",)])
@pytest.mark.parametrize(
    ("content", "prompt"), [("Jürgen", "Jürgen"), ("two\nlines\n", "two\nlines"), ("open\n\n", "open\n"), (" ", " ")]
)
def test_a_prompt_from_standard_input(checkpoint, capsys, standard_input, words, content, prompt):
    standard_input(content.encode())
    run_generate(words, model=checkpoint, options=SHORT)
    assert capsys.readouterr().out == continuation(prompt)


def test_a_prompt_from_a_file(checkpoint, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Sch\u00f6n\n", encoding="utf-8")
    run_generate(prompt_file=tmp_path / "prompt.txt", model=checkpoint, options=SHORT)
    assert capsys.readouterr().out == continuation("Sch\u00f6n")


@pytest.mark.parametrize("engine", ["btlm", "transformers"])
def test_the_continuation_without_the_prompt(checkpoint, capsys, engine):
    run_generate(["Once"], model=checkpoint, options=SHORT, engine=engine, no_echo=True)
    assert capsys.readouterr().out == continuation("Once").removeprefix("Once")


def test_a_draft_changes_no_text(checkpoint, tmp_path, capsys):
    small = save_tiny(tmp_path, n_layer=1)
    for options in (
        GenerationOptions(max_new_tokens=20),
        GenerationOptions(max_new_tokens=20, temperature=1.0, seed=3),
    ):
        texts = []
        for draft in (None, str(small)):
            run_generate(["Once"], model=checkpoint, options=options, draft=draft)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]


def test_one_token_is_singular(checkpoint, capsys):
    run_generate(["O"], model=checkpoint, options=SHORT)
    assert "\nbtlm: 1 prompt token, 6 new (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"engine": "transformers", "draft": "m"}, "draft only matter to the engine, .* by Transformers; leave"),
        ({"engine": "transformers", "threads": 1}, "threads only matter to the engine, .* by Transformers; leave"),
        ({"engine": "transformers", "kernels": "torch", "cache_dtype": "int8"}, "cache_dtype and kernels only matter"),
        ({"dtype": "bfloat16", "threads": 1}, r"by Transformers \(The engine has no dtype but the stored one\); leave"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(checkpoint, capsys, given, named):
    with pytest.raises(ValueError, match=named):
        run_generate(["a"], model=checkpoint, options=SHORT, **given)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": "float32"}, "no dtype but the stored one"),
        ({"device": "cuda"}, "no device but the processor"),
        ({"context_scaling": "dynamic"}, "no dynamic interpolation"),
        ({"context_scaling": "0.5"}, "no context scaling 0.5"),
        ({"context_scaling": "much"}, "no context scaling much"),
        ({"options": GenerationOptions(num_beams=2)}, "no beams"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_where_it_is_demanded(checkpoint, given, reason):
    with pytest.raises(NotSupported, match=reason):
        run_generate(["a"], model=checkpoint, engine="btlm", **given)


def test_beams(checkpoint, capsys):
    run_generate(["Once"], model=checkpoint, options=GenerationOptions(max_new_tokens=6, num_beams=3))
    out, err = capsys.readouterr()
    assert out.startswith("Once")
    assert out != continuation("Once")
    assert "prompt included" in err


def test_the_text_begins_before_it_ends(checkpoint, monkeypatch):
    """The prompt and the first tokens appear on standard output before later tokens are computed."""

    class Flushed(io.StringIO):
        def __init__(self):
            super().__init__()
            self.states = []

        def flush(self):
            self.states.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", flushed := Flushed())
    run_generate(["Once"], model=checkpoint, options=SHORT)
    assert flushed.states[0] == "Once"
    assert len(flushed.states) > 4
    assert flushed.states[-1] == continuation("Once")


@pytest.mark.parametrize(
    ("words", "content", "file", "expected"),
    [
        ([""], None, None, "The prompt is empty"),
        (["", ""], None, None, None),  # joined by a space, so the prompt is not empty
        ([], b"", None, "Standard input is empty"),
        (["-"], b"\n", None, "Standard input is empty"),
        ([], None, b"", "prompt.txt is empty"),
        ([], None, b"\xff\xfe", "prompt.txt is not UTF-8 text (byte 0)"),
        ([], b"ab\xff", None, "standard input is not UTF-8 text (byte 2)"),
        (["a\udcff"], None, None, "The prompt is not UTF-8 text (character 1)"),
        (["a"], None, b"b", "The prompt is given twice"),
    ],
)
def test_prompts_that_are_none(checkpoint, tmp_path, standard_input, words, content, file, expected):
    prompt_file = None
    if file is not None:
        prompt_file = tmp_path / "prompt.txt"
        prompt_file.write_bytes(file)
    standard_input(content or b"")
    if expected is None:
        run_generate(words, model=checkpoint, options=SHORT, prompt_file=prompt_file)
        return
    with pytest.raises(ValueError, match=r"prompt|input") as error:
        run_generate(words, model=checkpoint, options=SHORT, prompt_file=prompt_file)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_a_prompt_file_that_cannot_be_read(checkpoint, tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read: ") as error:
        run_generate(prompt_file=tmp_path / name, model=checkpoint)
    assert str(tmp_path / name) in str(error.value)


# Length


LONG = GenerationOptions(max_new_tokens=40)
PROMPT = "a prompt of forty bytes, which is enough"


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


def test_one_warning_past_the_training_length(checkpoint, capsys):
    run_generate([PROMPT], model=checkpoint, options=LONG)
    (warning,) = warnings(capsys)
    assert warning.startswith("btlm: warning: the prompt and max_new_tokens make 80 tokens, more than the 64")
    assert "context_scaling" in warning


def test_no_warning_up_to_the_training_length(checkpoint, capsys):
    run_generate([PROMPT], model=checkpoint, options=GenerationOptions(max_new_tokens=24))
    assert warnings(capsys) == []


@pytest.mark.parametrize(
    ("given", "scaling"),
    [("2", {"type": "linear", "factor": 2.0}), ("dynamic", {"type": "linear", "train_seq_len": 64})],
)
def test_context_scaling_changes_the_text(checkpoint, capsys, given, scaling):
    plain = continuation(PROMPT, length=40)
    run_generate([PROMPT], model=checkpoint, options=LONG, context_scaling=given)
    out, err = capsys.readouterr()
    assert out == continuation(PROMPT, tiny_model(alibi_scaling=scaling), length=40)
    assert out != plain
    assert "context_scaling" not in err


def test_learned_positions_end_in_an_error(tmp_path, checkpoint):
    tiny_model(position_embedding_type="learned").save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r"80 tokens.*learned positions end at 64"):
        run_generate([PROMPT], model=tmp_path, options=LONG)


def test_missing_mup_keys_are_one_line(copy, capsys):
    set_config(copy, mup_embeddings_scale=...)
    run_generate(["a"], model=copy, options=SHORT)
    (warning,) = warnings(capsys)
    assert warning.startswith("btlm: warning: ")
    assert "mup_embeddings_scale" in warning
