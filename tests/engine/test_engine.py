import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from btlm.checkpoint import BUNDLED_MODEL
from btlm.checkpoint.open import Checkpoint
from btlm.engine import Engine, GenerationOptions
from btlm.engine.cache import CACHE_DTYPES
from btlm.engine.network import Network
from btlm.errors import DoesNotFit, EngineFull, NotSupported, TooLong
from btlm.kernels import load_kernels
from btlm.model import BTLMLMHeadModel
from tests.checkpoint.tiny import END, TINY, change_tensors, save_tiny, tiny_model

HAS_NATIVE = importlib.util.find_spec("btlm.kernels._native") is not None
native = pytest.mark.skipif(not HAS_NATIVE, reason="btlm was installed without a compiler")
ENOUGH = [*b"to be or not to be, that is to be or not"]  # repetitive, so guesses are made, right and wrong ones
LONGER = [*b"the same words again: to be or not to be, and the same words again"]


def engine(folder, *, max_tokens=256, kernels="auto", cache_dtype="float32", context=200, num_requests=1):
    network = Network(
        load_kernels(kernels, 2),
        Checkpoint.open(folder).architecture,
        Checkpoint.open(folder).tensors,
        max_tokens=max_tokens,
    )
    return Engine(network, cache_dtype=cache_dtype, context=context, num_requests=num_requests)


def greedy(length=12, **options):
    return GenerationOptions(max_new_tokens=length, **options)


def write(one, ids, options=None, stop_ids=frozenset()):
    return list(one.generate(ids, options or greedy(), stop_ids=stop_ids))


def theirs(model, ids, length=12):
    """Greedy continuation by Transformers, and the log-probabilities of its tokens."""
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=END,
        )[0]
    return out[len(ids) :].tolist(), scores_of(model, out.tolist())[len(ids) - 1 :]


def scores_of(model, ids):
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]].numpy()


def until_finished(*texts):
    """Count steps until the texts are finished; an engine that never finishes fails the test instead of hanging."""
    for step in range(500):
        if all(text.finished for text in texts):
            return
        yield step
    raise AssertionError(f"not finished: {texts}")


def logprobs(tokens):
    return np.array([token.logprob for token in tokens])


# Comparison with Transformers

VARIANTS = [
    {},
    {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    {"alibi_scaling": {"type": "linear", "factor": 2.5}},
    {"tie_word_embeddings": False},
    {"mup_scale_qk_dot_by_d": False},
    {"scale_attn_weights": False},
    {"n_inner": None},
    {"n_embd": 60, "n_head": 3, "vocab_size": 300},
    {"n_embd": 160, "n_head": 2},
]


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=native)])
@pytest.mark.parametrize("values", VARIANTS)
def test_greedy_text_is_that_of_transformers(tmp_path, kernels, values):
    folder, model = save_tiny(tmp_path, **values), tiny_model(**values)
    ours = write(engine(folder, kernels=kernels), ENOUGH)
    ids, scores = theirs(model, ENOUGH)
    assert [token.id for token in ours] == ids
    assert np.abs(logprobs(ours) - scores).max() < 2e-4


def test_bf16_weights_compute_as_fp32(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    model = BTLMLMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    ours = write(engine(tmp_path), ENOUGH)
    ids, scores = theirs(model, ENOUGH)
    assert [token.id for token in ours] == ids
    assert np.abs(logprobs(ours) - scores).max() < 2e-4


def test_fp16_weights(tmp_path):
    tiny_model().half().save_pretrained(tmp_path)
    model = BTLMLMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert [token.id for token in write(engine(tmp_path), ENOUGH)] == theirs(model, ENOUGH)[0]


def test_a_sharded_checkpoint(tmp_path, checkpoint):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert write(engine(tmp_path), ENOUGH) == write(engine(checkpoint), ENOUGH)


def test_a_checkpoint_of_the_bare_transformer(copy, checkpoint):
    change_tensors(copy, lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()})
    assert write(engine(copy), ENOUGH) == write(engine(checkpoint), ENOUGH)


def test_scores(checkpoint):
    one = engine(checkpoint, max_tokens=16)
    ids = LONGER
    ours = one.score(ids)
    assert ours.dtype == np.float32
    assert np.abs(ours - scores_of(tiny_model(), ids)).max() < 2e-4
    if HAS_NATIVE:
        assert np.array_equal(one.score(ids), ours)  # also with the text already in the cache
        assert np.array_equal(engine(checkpoint, max_tokens=7).score(ids), ours)
    assert len(one.score(ids[:2])) == 1
    # The cache now holds the text. Reusing it gives the same result as computing it again.
    reused = list(one.generate([*ids, 5], greedy(), stop_ids=frozenset()))
    assert np.allclose(logprobs(reused), logprobs(write(engine(checkpoint), [*ids, 5])), atol=1e-4)


def test_a_score_needs_two_tokens_and_leaves_the_engine_usable(checkpoint):
    one = engine(checkpoint)
    for ids in ([], [1]):
        with pytest.raises(ValueError, match=r"token") as error:
            one.score(ids)
        assert "\n" not in str(error.value)
        assert one.has_room


# Identical bits


@native
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_chunks_of_a_prompt_change_nothing(checkpoint, cache_dtype):
    expected = write(engine(checkpoint, cache_dtype=cache_dtype), LONGER)
    for max_tokens in (1, 3, 16, 64):
        assert write(engine(checkpoint, cache_dtype=cache_dtype, max_tokens=max_tokens), LONGER) == expected


@native
@pytest.mark.parametrize("cache_dtype", ["float32", "int8", "int4"])
def test_texts_that_come_and_go_do_not_change_each_other(checkpoint, cache_dtype):
    prompts = [ENOUGH, [7], LONGER, ENOUGH[5:9], [3, 4]]
    samples: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 1},
        {},
        {"top_k": 9, "seed": 2},
        {"repetition_penalty": 1.4},
    ]
    options = [greedy(4 + 3 * i, **given) for i, given in enumerate(samples)]
    alone = [
        write(engine(checkpoint, cache_dtype=cache_dtype), ids, choice)
        for ids, choice in zip(prompts, options, strict=True)
    ]
    for num_requests, max_tokens in ((2, 256), (3, 8), (5, 20)):
        one = engine(checkpoint, cache_dtype=cache_dtype, num_requests=num_requests, max_tokens=max_tokens)
        together: list[list[Any]] = [[] for _ in prompts]
        for index, token in one.generate_batch(prompts, options, stop_ids=frozenset()):
            together[index].append(token)
        assert together == alone
        assert one.has_room
    one = engine(checkpoint, cache_dtype=cache_dtype, num_requests=3)
    first = one.add(prompts[2], options[2], stop_ids=frozenset())
    written: dict[Any, list[Any]] = {first: []}
    for step in range(40):
        if step == 2:
            written[one.add(prompts[0], options[0], stop_ids=frozenset())] = []
        if step == 3:
            gone = one.add(prompts[1], options[1], stop_ids=frozenset())
            written[gone] = []
        if step == 5:
            one.remove(gone)
            written[one.add(prompts[3], options[3], stop_ids=frozenset())] = []
        for text, token in one.step():
            written[text].append(token)
    assert one.step() == []
    whole = list(written.values())
    assert [whole[0], whole[1], whole[3]] == [alone[2], alone[0], alone[3]]
    assert 0 < len(whole[2]) < len(alone[1])
    assert whole[2] == alone[1][: len(whole[2])]


@native
@pytest.mark.parametrize("cache_dtype", ["float32", "int8", "int4"])
def test_reused_prefixes_change_nothing(checkpoint, cache_dtype):
    one = engine(checkpoint, cache_dtype=cache_dtype, num_requests=2)
    said = [token.id for token in write(one, LONGER)]
    for ids in ([*LONGER, *said, 9, 9], LONGER, LONGER[:30], [*LONGER[:65], 1, 2], [*LONGER, *said[:5], 200], [200]):
        text = one.add(ids, greedy(), stop_ids=frozenset())
        assert text.reused_tokens > 0 or ids == [200]
        tokens = []
        for _ in until_finished(text):
            tokens += [token for _, token in one.step()]
        assert tokens == write(engine(checkpoint, cache_dtype=cache_dtype), ids)
    # When the first text was finished, the cache held all of its tokens except the last.
    again = engine(checkpoint, cache_dtype=cache_dtype)
    write(again, LONGER)
    assert again.add([*LONGER, *said, 9], greedy()).reused_tokens == len(LONGER) + len(said) - 1


@native
def test_the_beginning_of_a_running_text_is_reused(checkpoint):
    one = engine(checkpoint, num_requests=2)
    first = one.add(LONGER, greedy(30), stop_ids=frozenset())
    written: dict[Any, list[Any]] = {first: []}
    for _ in range(4):
        written[first] += [token for _, token in one.step()]
    second = one.add([*LONGER[:65], 42], greedy(20), stop_ids=frozenset())
    assert second.reused_tokens == 65
    written[second] = []
    for _ in until_finished(first, second):
        for text, token in one.step():
            written[text].append(token)
    assert written[first] == write(engine(checkpoint), LONGER, greedy(30))
    assert written[second] == write(engine(checkpoint), [*LONGER[:65], 42], greedy(20))


RULES = [
    {},
    {"temperature": 0.3, "seed": 3},
    {"top_p": 0.5, "temperature": 0.3, "seed": 4, "repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 3},
    {"repetition_penalty": 0.8},
    {"top_k": 3, "seed": 5, "no_repeat_ngram_size": 4},
    {"frequency_penalty": 0.2, "presence_penalty": -0.1, "logit_bias": {7: 0.5}},
]


@native
@pytest.mark.parametrize("cache_dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("good", [True, False])
def test_guesses_change_nothing(checkpoint, monkeypatch, cache_dtype, rules, good):
    """Guesses of the lookup, which are few here, and invented ones of which every fifth token is wrong."""
    length = 70
    plain = write(engine(checkpoint, cache_dtype=cache_dtype), ENOUGH, greedy(length, lookup_tokens=0, **rules))
    if good:
        following = [token.id if i % 5 else END - token.id for i, token in enumerate(plain)]

        def know(lookup, ids):
            return following[len(ids) - len(ENOUGH) :][: lookup.most]

        monkeypatch.setattr("btlm.engine.speculation.PromptLookup.guess", know)
    for most in (1, 3, 16):
        one = engine(checkpoint, cache_dtype=cache_dtype, max_tokens=64 if most == 3 else 9)
        text = one.add(ENOUGH, greedy(length, lookup_tokens=most, **rules), stop_ids=frozenset())
        tokens, steps = [], 0
        for _ in until_finished(text):
            tokens += [token for _, token in one.step()]
            steps += 1
        assert tokens == plain
        of_prompt = -(-len(ENOUGH) // one.network.max_tokens)
        assert steps == of_prompt - 1 + length - text.lookup.accepted
        if good:
            assert 15 < text.lookup.accepted < text.lookup.guessed
        elif not rules:
            assert 0 < text.lookup.accepted < text.lookup.guessed


@native
def test_a_token_does_not_know_what_follows(checkpoint):
    one = engine(checkpoint)
    scores = one.score(LONGER)
    for length in (2, 20, 64, 65):
        other = [*LONGER[:length], *(255 - token for token in LONGER[length:])]
        assert np.array_equal(one.score(other)[: length - 1], scores[: length - 1])
        assert not np.array_equal(one.score(other), scores)


def test_the_seed_decides(checkpoint):
    one = engine(checkpoint)
    first, second, other = (write(one, ENOUGH, greedy(30, temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


# Where texts end


def test_stop_ids(checkpoint):
    one = engine(checkpoint)
    tokens = write(one, ENOUGH, greedy(30))
    for stop in {token.id for token in tokens}:
        last = next(i for i, token in enumerate(tokens) if token.id == stop)
        text = one.add(ENOUGH, greedy(30), stop_ids=frozenset({stop}))
        stopped = []
        for _ in until_finished(text):
            stopped += [token.id for _, token in one.step()]
        assert stopped == [token.id for token in tokens[: last + 1]]
        assert text.finished == "stop"
        assert text.ids == [*ENOUGH, *stopped]
        assert one.has_room
    assert one.add([1]).stop_ids == {END}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_length_is_kept(checkpoint, length):
    one = engine(checkpoint)
    text = one.add(ENOUGH, greedy(length), stop_ids=frozenset())
    tokens = []
    for _ in until_finished(text):
        tokens += one.step()
    assert (len(tokens), text.new_tokens, text.finished) == (length, length, "length")


def test_a_text_fills_its_context(checkpoint):
    """Texts fill the last place of the cache, also with guesses, for contexts at and near the size of a block."""
    for context in (63, 64, 65):
        one = engine(checkpoint, context=context)
        length = context - len(ENOUGH) + 1
        tokens = write(one, ENOUGH, greedy(length, lookup_tokens=16))
        assert len(tokens) == length
        with pytest.raises(TooLong, match=f"exceed the context of {context} tokens"):
            write(one, ENOUGH, greedy(length + 1))


def test_a_reader_who_leaves_ends_the_text(checkpoint):
    one = engine(checkpoint)
    stream = one.generate(ENOUGH, greedy(30), stop_ids=frozenset())
    next(stream)
    assert not one.has_room
    stream.close()
    assert one.has_room


# Errors


@pytest.mark.parametrize(
    ("ids", "options", "kind", "what"),
    [
        ([], {}, ValueError, "no tokens; give at least one"),
        ([1, 257], {}, ValueError, "Token 257 is not in the vocabulary of 257"),
        ([-1], {}, ValueError, "Token -1 is not"),
        ([1] * 195, {}, TooLong, "195 prompt tokens and 12 new ones exceed the context of 200 tokens"),
        ([1], {"num_beams": 2}, NotSupported, "no beams"),
    ],
)
def test_prompts_that_are_refused(checkpoint, ids, options, kind, what):
    one = engine(checkpoint)
    for call in (one.add, one.generate, lambda *given: one.generate_batch([[1], ids], given[1])):
        with pytest.raises(kind, match=what) as error:
            list(call(ids, greedy(**options)) or [])
        assert "\n" not in str(error.value)
        assert one.has_room


@native
def test_streams_of_one_engine_are_whole(checkpoint):
    """A step that one stream runs also produces tokens for the other stream."""
    one = engine(checkpoint, num_requests=3)
    streams = [one.generate(ids, greedy(), stop_ids=frozenset()) for ids in (ENOUGH, LONGER)]
    other = one.add([7], greedy(20), stop_ids=frozenset())
    together = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == [
        write(engine(checkpoint), ENOUGH),
        write(engine(checkpoint), LONGER),
    ]
    for _ in until_finished(other):
        one.step()
    assert other.tokens == write(engine(checkpoint), [7], greedy(20))


def test_a_score_that_fails_leaves_room(checkpoint, monkeypatch):
    one = engine(checkpoint, kernels="torch")
    expected = one.score(LONGER)
    with monkeypatch.context() as patch:
        patch.setattr(one.network, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.score(LONGER)
    assert one.has_room
    assert np.array_equal(one.score(LONGER), expected)


def test_fp16_counts_with_its_copy(tmp_path, monkeypatch):
    tiny_model().half().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    needed = []
    monkeypatch.setattr("btlm.engine.engine.check_memory", lambda architecture, weights, *_: needed.append(weights))
    Engine.open(tmp_path, kernels="torch")
    assert 2.5 * size < needed[0] <= 3 * size


def test_a_full_engine(checkpoint):
    one = engine(checkpoint, num_requests=2)
    texts = [one.add([1], greedy()), one.add([1], greedy())]
    assert not one.has_room
    with pytest.raises(EngineFull, match="full: 2 requests are under way"):
        one.add([1])
    with pytest.raises(EngineFull, match="full"):
        write(one, [1])
    one.remove(texts[0])
    one.remove(texts[0])  # removing a text twice does no harm
    assert len(write(one, [1])) == 12
    assert len(texts[1].tokens) == 12  # every step continued this text as well


def test_text_instead_of_tokens_is_refused_by_name(checkpoint):
    one = engine(checkpoint)
    for use in (
        lambda: write(one, "Hello"),
        lambda: one.add("Hello"),
        lambda: one.score("Hello"),
        lambda: list(one.generate_batch("Hello")),
        lambda: list(one.generate_batch(["Hello"])),
    ):
        with pytest.raises(TypeError, match=r"takes token ids, not text; btlm\.generate\.TextGenerator takes text"):
            use()
    assert one.has_room


def test_unknown_cache_dtypes(checkpoint):
    with pytest.raises(ValueError, match=r"'fp8' is unknown; choose one of auto, int4, int8, bfloat16, float32"):
        Engine.open(checkpoint, cache_dtype="fp8", kernels="torch")
    assert [Engine.open(checkpoint, cache_dtype=name).cache.dtype for name in CACHE_DTYPES] == [
        "float32",
        "int4",
        "int8",
        "bfloat16",
        "float32",
    ]


@pytest.mark.parametrize(("context", "num_requests"), [(0, 1), (64, 0), (-5, 1)])
def test_impossible_sizes(checkpoint, context, num_requests):
    with pytest.raises(ValueError, match="both are at least 1"):
        Engine.open(checkpoint, context=context, num_requests=num_requests)


@pytest.mark.skipif(not HAS_NATIVE, reason="compares with the native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_for_unpacked_weights_is_counted(copy, monkeypatch, dtype):
    """Torch computes on copies in fp32 of weights that are not fp32."""
    change_tensors(copy, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    counted = []
    monkeypatch.setattr("btlm.engine.engine.check_memory", lambda _, weights, *__: counted.append(weights))
    for kernels in ("torch", "native"):
        Engine.open(copy, context=4, kernels=kernels)
    extra = 0 if dtype == torch.float32 else 4 * tiny_model().num_parameters()
    assert counted[0] - counted[1] == extra


def test_more_context_than_memory(checkpoint, monkeypatch):
    monkeypatch.setattr("btlm.engine.engine.available_memory", lambda: 1_000_000_000)
    # 2 layers x 4 heads x keys and values x 16 dimensions (8, padded) x 4 bytes: 1,024 bytes per token.
    with pytest.raises(
        DoesNotFit, match=r"A cache of 2,000,000 tokens takes 2\.05 GB in float32.*1\.00 GB of memory are free.*int4"
    ) as error:
        Engine.open(checkpoint, context=1_000_000, num_requests=2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="use a shorter context"):
        Engine.open(checkpoint, context=10_000_000, cache_dtype="int4")
    monkeypatch.setattr("btlm.engine.engine.available_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"use weights in fewer bits \(btlm quantize\)"):
        Engine.open(checkpoint)
    monkeypatch.setattr("btlm.engine.engine.available_memory", lambda: None)
    assert Engine.open(checkpoint).context == TINY["n_positions"]


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_weights_that_do_not_fit(copy, change):
    name = "transformer.h.1.mlp.c_fc2.weight"

    def broken(tensors):
        tensor = tensors.pop(name)
        if change == "shape":
            tensors[name] = tensor[:, :20].contiguous()
        if change == "dtype":
            tensors[name] = tensor.to(torch.int8)
        return tensors

    change_tensors(copy, broken)
    with pytest.raises(ValueError, match=name) as error:
        Engine.open(copy, kernels="torch")
    assert "\n" not in str(error.value)


# Quantized weights and cache


@pytest.mark.parametrize(("cache_dtype", "far"), [("bfloat16", 0.1), ("int8", 0.1), ("int4", 0.3)])
def test_smaller_caches_are_close_to_fp32(checkpoint, cache_dtype, far):
    exact = engine(checkpoint).score(LONGER)
    close = engine(checkpoint, cache_dtype=cache_dtype).score(LONGER)
    assert 0 < np.abs(close - exact).mean() < far


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    from btlm.convert.quantize import quantize

    folder = tmp_path_factory.mktemp("quantized")
    for bits in (4, 8):
        values = {"n_embd": 128, "n_inner": 200, "n_head": 4, "initializer_range": 0.1}
        plain = folder / f"plain{bits}"
        plain.mkdir()
        quantize(save_tiny(plain, **values), folder / str(bits), bits=bits, group_size=64, table_bits=8)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folders(quantized, bits):
    """The only difference from the model in Transformers is that activations are rounded to eight bits."""
    folder = quantized / str(bits)
    model = BTLMLMHeadModel.from_pretrained(folder)
    expected = scores_of(model.float().eval(), LONGER)
    scores = {
        name: engine(folder, kernels=name).score(LONGER) for name in (["torch", "native"] if HAS_NATIVE else ["torch"])
    }
    for ours in scores.values():
        assert np.abs(ours - expected).mean() < 0.05
        assert abs(ours.mean() - expected.mean()) < 0.02
    if HAS_NATIVE:
        # A value that is rounded the other way changes a token by one step of eight bits.
        assert np.abs(scores["torch"] - scores["native"]).mean() < 0.02
    assert Engine.open(folder).cache.dtype == "int8"


# The engine runs without torch


@native
def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys, btlm.checkpoint, btlm.engine\n"
        "engine = btlm.engine.Engine.open(btlm.checkpoint.BUNDLED_MODEL, context=64, threads=1)\n"
        "assert len(list(engine.generate([1, 2, 3], btlm.engine.GenerationOptions(max_new_tokens=3)))) >= 1\n"
        "heavy = {'torch', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    environment = {key: value for key, value in os.environ.items() if key != "BTLM_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_bundled_model_is_read_as_transformers_reads_it():
    ids = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    expected = scores_of(BTLMLMHeadModel.from_pretrained(BUNDLED_MODEL).float().eval(), ids)
    assert np.abs(Engine.open(BUNDLED_MODEL, context=64).score(ids) - expected).mean() < 0.1


def test_a_cache_that_fits_takes_half_of_what_is_free(checkpoint, monkeypatch):
    def tokens(free):
        monkeypatch.setattr("btlm.engine.engine.available_memory", lambda: free)
        engine = Engine.open(checkpoint, context=640, num_requests=10, cache_tokens="fit", cache_dtype="float32")
        return engine.cache.num_tokens

    assert tokens(None) == tokens(10**12) == 6400  # more cannot be used
    per_token = 1024  # bytes, see above
    some = tokens(20_000_000)
    assert 640 < some < 6400
    assert 16_000_000 < 20_000_000 - 2 * some * per_token < 20_000_000  # for weights, activations and Python
    assert tokens(20_000_000 + 2 * 640 * per_token) == some + 640
    with pytest.raises(DoesNotFit):  # one request always has its places
        tokens(16_100_000)
