import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import btlm
import btlm.checkpoint.adapter
import btlm.convert.gguf
import btlm.convert.quantize
import btlm.data.inspect
import btlm.data.pipeline
import btlm.evaluate.bench
import btlm.generate.continue_prompt
import btlm.generate.with_transformers
import btlm.plan.info
import btlm.plan.plan
import btlm.train.command
from btlm.checkpoint import BUNDLED_MODEL
from btlm.cli import main
from btlm.convert.options import QuantizeOptions
from btlm.data.recipe import Clean, DataRecipe, Dedup, Execution, Inspection, Mix, Read
from btlm.engine import GenerationOptions
from btlm.errors import NotFinite, OptionError
from btlm.evaluate.options import Bench
from btlm.plan.options import Hardware
from tests.checkpoint.tiny import save_tiny

ROOT = Path(__file__).parents[1]
DATA_STEPS = ["prepare", "clean", "dedup", "mix", "tokenize", "inspect"]
COMMANDS = [
    "generate",
    "info",
    "merge",
    "quantize",
    "export-gguf",
    "bench",
    "train",
    "coord-check",
    "transfer",
    "data",
    *(f"data {step}" for step in DATA_STEPS),
]

# What Python calls its own things, which a user should not have to read.
LEAK = re.compile(
    r"<(class|function|object|built-in)|typing\.|Annotated|Literal|NoneType|PosixPath|MISSING|SUPPRESS|None\b"
)

# Without these, something is left out: there is no value in their place.
NO_DEFAULT = {"--prompt-file", "--data", "--output", "--set", "--recipe"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def error_of(capsys):
    """The one line of an error on standard error."""

    def run(*argv):
        status = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("btlm: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert not LEAK.search(err)
        return err

    return run


@pytest.fixture
def called(monkeypatch):
    """Replace the functions behind the commands and record their arguments."""
    calls = []
    for module, name in (
        (btlm.generate.continue_prompt, "run_generate"),
        (btlm.plan.info, "run_info"),
        (btlm.convert.quantize, "quantize"),
        (btlm.convert.gguf, "export_gguf"),
        (btlm.checkpoint.adapter, "merge"),
        (btlm.evaluate.bench, "run_bench"),
        (btlm.train.command, "run_training"),
        (btlm.plan.plan, "run_plan"),
        *((btlm.data.pipeline, f"run_{step}") for step in DATA_STEPS[:-1]),
        (btlm.data.inspect, "run_inspect"),
    ):
        monkeypatch.setattr(module, name, lambda *args, name=name, **options: calls.append((name, args, options)))
    return calls


def start(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(btlm.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-m", "btlm", *argv], env=environment, text=True, **options)


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    out, err = capsys.readouterr()
    assert done.value.code == 0
    assert err == ""
    assert out.startswith(f"usage: btlm {command}".rstrip())
    assert max(map(len, out.splitlines())) <= 80
    assert not LEAK.search(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_default_for_every_option_that_takes_a_value(capsys, command):
    if command == "data":
        return
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    for option in re.split(r"\n  (?=-)", capsys.readouterr().out.partition("\nexamples:")[0])[1:]:
        found = re.match(r"([\w.-]+)(?:, [\w.-]+)?(?: (\S.*?))?(?:  |\n|$)", option)
        assert found
        # A folder to write to, a file to read, and a flag have none.
        if found[1] not in NO_DEFAULT and found[2]:
            assert re.search(r"\(default:|\(required\)", option), option


def test_help_waits_for_nothing_heavy():
    program = (
        "import sys\nfrom btlm.cli import main\n"
        f"for command in {['', *COMMANDS]!r}:\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'transformers', 'yaml', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_nothing_asked_is_answered_with_help(capsys):
    with pytest.raises(SystemExit) as done:
        main([])
    assert done.value.code == 0
    out = capsys.readouterr().out
    for command in ("generate", "info", "quantize", "train", "data"):
        assert f"\n    {command} " in out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"btlm {btlm.__version__}\n"


# Arguments that the functions receive


def test_generate_by_default(called):
    assert main(["generate", "Once", "upon"]) == 0
    assert called == [("run_generate", (), {"prompt": ["Once", "upon"], "options": GenerationOptions()})]


def test_generate_with_every_option(called):
    given = "--model m --dtype float32 --device cpu --context-scaling 2 --prompt-file p --max-new-tokens 3 --no-echo"
    sampling = "--temperature 0.5 --top-p 0.9 --top-k 7 --seed 1 --no-repeat-ngram-size 2"
    assert main(["generate", *given.split(), *sampling.split()]) == 0
    ((_, _, options),) = called
    assert options == {
        "prompt": [],
        "model": "m",
        "dtype": "float32",
        "device": "cpu",
        "context_scaling": "2",
        "prompt_file": "p",
        "no_echo": True,
        "options": GenerationOptions(
            max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, seed=1, no_repeat_ngram_size=2
        ),
    }


def test_generate_with_beams(called):
    assert main(["generate", "-", "--num-beams", "4"]) == 0
    assert called[0][2] == {"prompt": ["-"], "options": GenerationOptions(num_beams=4)}


@pytest.mark.parametrize("prompt", ["null", "12", "[1, 2]", "{a: b}", "", "--not-an-option"])
def test_a_prompt_is_never_read_as_anything_else(called, prompt):
    assert main(["generate", "--", prompt]) == 0
    assert called[0][2]["prompt"] == [prompt]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("info", ("run_info", (BUNDLED_MODEL,), {"as_json": False})),
        ("info recipe.yaml --json", ("run_info", ("recipe.yaml",), {"as_json": True})),
        (
            "quantize m o",
            ("quantize", ("m", "o"), {"bits": 4, "group_size": 128, "table_bits": 8, "calibration": None}),
        ),
        (
            "quantize m o --bits 8 --group-size 64 --table-bits 4 --calibrate t.txt",
            ("quantize", ("m", "o"), {"bits": 8, "group_size": 64, "table_bits": 4, "calibration": "t.txt"}),
        ),
        ("merge a o", ("merge", ("a", "o"), {})),
        ("merge a o --base b", ("merge", ("a", "o"), {"base": "b"})),
        ("quantize m o --base b", ("quantize", ("m", "o"), {**vars(QuantizeOptions()), "base": "b"})),
        ("export-gguf m o.gguf --base b", ("export_gguf", ("m", "o.gguf"), {"type": "F16", "base": "b"})),
        ("info m --base b", ("run_info", ("m",), {"as_json": False, "base": "b"})),
        ("bench m --base b", ("run_bench", (["m"],), {**vars(Bench()), "base": "b"})),
        ("export-gguf m o.gguf --type Q8_0", ("export_gguf", ("m", "o.gguf"), {"type": "Q8_0"})),
        ("train r.yaml --data d --output o", ("run_training", ("r.yaml", "d", "o", "auto", {}), {})),
        ("train r.yaml --data d --output o --device cuda", ("run_training", ("r.yaml", "d", "o", "cuda", {}), {})),
        ("train r.yaml --plan", ("run_plan", ("r.yaml", Hardware(), {}, "auto"), {})),
        (
            "train r.yaml --plan --mfu 0.55 --peak-tflops 312 --devices 8,64 --set seed=2",
            ("run_plan", ("r.yaml", Hardware(None, 312.0, 0.55, [8, 64]), {"seed": 2}, "auto"), {}),
        ),
        ("train r.yaml --plan --hardware h100", ("run_plan", ("r.yaml", Hardware("h100"), {}, "auto"), {})),
        ("data prepare a b --output o", ("run_prepare", (["a", "b"], "o", DataRecipe(), Execution()), {})),
        (
            "data prepare a --output o --mix.holdout 0.2 --workers 3 --memory-gb 4 --force",
            (
                "run_prepare",
                (["a"], "o", DataRecipe(mix=Mix(holdout=0.2)), Execution(workers=3, memory_gb=4.0, force=True)),
                {},
            ),
        ),
        ("data clean a --output o", ("run_clean", (["a"], "o", Read(), Clean(), Execution()), {})),
        (
            "data dedup a --output o --dedup.threshold 0.5 --executor slurm --slurm-partition p",
            (
                "run_dedup",
                (["a"], "o", Read(), Dedup(threshold=0.5), Execution(executor="slurm", slurm_partition="p")),
                {},
            ),
        ),
        (
            'data mix a --output o --mix.weights {"Web":1.5}',
            ("run_mix", (["a"], "o", Read(), Mix(weights={"Web": 1.5}), Execution()), {}),
        ),
        (
            "data tokenize a --output o --read.text_field content",
            ("run_tokenize", (["a"], "o", Read(text_field="content"), Execution()), {}),
        ),
        (
            "data mix a --output o --mix.decontaminate x,y --read.source_fields=[a,'b,c']",
            (
                "run_mix",
                (["a"], "o", Read(source_fields=["a", "b,c"]), Mix(decontaminate=["x", "y"]), Execution()),
                {},
            ),
        ),
        ("data inspect d", ("run_inspect", ("d", Inspection()), {})),
    ],
)
def test_the_other_commands(called, line, expected):
    assert main(line.split()) == 0
    assert called == [expected]


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("optimizer.lr=1.0e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=1e-3", "optimizer.lr", "1e-3"),  # the recipe's error says what to write instead
        ("stages=[{sequence_length: 16, tokens: 64}]", "stages", [{"sequence_length": 16, "tokens": 64}]),
        ("start.model=a=b", "start.model", "a=b"),
        ("lora={}", "lora", {}),
        ("lora=", "lora", None),
        ("precision.compile=false", "precision.compile", False),
        ("watching.wandb_project=two words", "watching.wandb_project", "two words"),
    ],
)
def test_a_setting_is_yaml(called, setting, key, value):
    assert main(["train", "r.yaml", "--data", "d", "--output", "o", "--set", setting]) == 0
    assert called == [("run_training", ("r.yaml", "d", "o", "auto", {key: value}), {})]


def test_settings_add_up_and_the_last_word_counts(called):
    settings = ["--set", "seed=1", "--set", "model.n_layer=2", "--set", "seed=3"]
    assert main(["train", *settings, "r.yaml", "--data", "d", "--output", "o"]) == 0
    assert called[0][1][-1] == {"seed": 3, "model.n_layer": 2}


# Mistakes


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nonsense", "'nonsense'"),
        ("--nonsense", "--nonsense"),
        ("generate x --temprature 1", "--temprature"),
        ("generate x --temp 1", "--temp"),  # abbreviations are not completed
        ("generate x --model", "--model: expected one argument"),
        ("generate x --max-new-tokens many", "--max-new-tokens: 'many' is not a whole number"),
        ("generate x --max-new-tokens 1.5", "'1.5' is not a whole number"),
        ("generate x --temperature hot", "--temperature: 'hot' is not a number"),
        ("generate x --max-new-tokens 0", "--max-new-tokens is 0"),
        ("generate x --max-new-tokens -1", "--max-new-tokens is -1"),
        ("generate x --num-beams 0", "--num-beams is 0"),
        ("generate x --temperature -1", "--temperature is -1.0"),
        ("generate x --temperature 0 --top-k 5", "--temperature 0 always takes the most probable token"),
        ("generate x --temperature nan", "--temperature is nan"),
        ("generate x --top-p 0", "--top-p is 0.0"),
        ("generate x --top-p 1.01", "--top-p is 1.01"),
        ("generate x --top-k 0", "--top-k is 0"),
        ("generate x --num-beams 4 --temperature 1", "use one or the other"),
        ("generate x --seed 1", "--seed needs sampling"),
        ("generate x --model ./absent", "There is no folder './absent'"),
        ("generate x --model owner/absent", "owner/absent is neither a folder here"),
        ("generate x --prompt-file y", "The prompt is given twice"),
        ("generate --prompt-file /absent/file", "/absent/file cannot be read"),
        ("info ./absent", "There is no folder './absent'"),
        ("info absent.yaml", "absent.yaml"),
        ("data nonsense", "'nonsense' is not a command (choose from prepare, clean, dedup, mix, tokenize, inspect)"),
        ("trian", "'trian' is not a command: did you mean train?"),
        ("generate x --temprature 1", "unrecognized arguments: --temprature 1: did you mean --temperature?"),
        ("generate x --engine gpu", "--engine is 'gpu', not one of auto, btlm, transformers"),
        ("generate x --threads 0", "--threads is 0, not a whole number from 1 to 1,024"),
        ("generate x --top-k 0 --top-p 2", "--top-p is 2.0, not a number above 0 and at most 1; --top-k is 0"),
        ("quantize m o --bits 5", "--bits is '5', not one of 4, 8"),
        ("export-gguf m o --type F17", "--type is 'F17', not one of F32, F16, Q8_0, Q4_0"),
        ("bench --dtypes 4bit,int3", "--dtypes is ('4bit', 'int3'), not a list of any of 4bit, 8bit"),
        ("bench --contexts 512,many", "--contexts: 'many' is not a whole number"),
        ("bench --contexts 512 2048", "2048"),
        ("bench --contexts 8 --new-tokens 8", "--contexts are [8]; each must exceed the 8 of --new-tokens"),
        ("coord-check --widths 64 --steps 0", "--steps is 0, not a whole number of at least 1"),
        ("coord-check --widths 64,64", "--widths are [64, 64]; give two or more different ones"),
        ("coord-check --ablate {x}", "--ablate is '{x}'; choose one of hidden-init"),
        ("transfer r.yaml", "required: --data, --output, --trials"),
        ("transfer r --data d --output o --trials 1 --output-alpha 2,1", "--output-alpha is searched from 2.0 to 1.0"),
        ("transfer r --data d --output o --trials 1 --lr 0.1", "--lr is searched from 0.1; give a lower"),
        ("data mix x", "required: --output"),
        ("data mix x --output y --executor slurm", "--executor is slurm; name the partition of its jobs in --slurm-pa"),
        ("data mix x --output y --workers 0 --mix.seed -1", "workers is 0, not a whole number of at least 1; mix.seed"),
        ("data mix x --output y --read.source_field a", "did you mean --read.source_fields?"),
        ("data mix x --output y --mix.weights [", "'[' is not YAML"),
        ("data inspect x --examples 0", "--examples is 0"),
        ("data tokenize", "required"),
        ("data mix x --output y --dedup.bands 2", "dedup.bands"),
        ("train", "required"),
        ("train r.yaml", "train needs --data and --output: the token shards and a folder for the run; or --plan"),
        ("train r.yaml --data d", "train needs --output:"),
        ("train r.yaml --output o", "train needs --data:"),
        ("train absent.yaml --data d --output o", "absent.yaml is not a readable recipe: "),
        ("train absent.yaml --plan", "absent.yaml is not a readable recipe: "),
        (f"train {ROOT}/recipes/btlm-tiny.yaml --data ./absent --output o", "There is no folder absent"),
        ("train r.yaml --plan --mfu much", "--mfu: 'much' is not a number"),
        ("train r.yaml --plan --devices 8,many", "--devices: 'many' is not a whole number"),
        ("train r.yaml --plan --peak-tflops", "--peak-tflops: expected one argument"),
        ("train r.yaml --plan --mfu 0.3", "--mfu is a share of a peak; give --hardware or --peak-tflops, too."),
        ("train r.yaml --data d --output o --set seed", "--set 'seed' is not of the form KEY=VALUE"),
        ("train r.yaml --data d --output o --set =1", "--set '=1' is not of the form KEY=VALUE"),
        ("train r.yaml --data d --output o --set seed=[", "--set 'seed=[': the value is not YAML (while parsing"),
        ("train r.yaml --plan --set seed", "--set 'seed' is not of the form KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line(error_of, line, expected):
    assert expected in error_of(*line.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--dtype", "float7"], "'float7' is unknown"),
        (["--device", "abacus"], "'abacus' is unknown"),
        (["--device", "cuda:99"], "cuda:99 is not available here"),
        (["--context-scaling", "0.5"], "The context scaling is 0.5"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(error_of, checkpoint, options, expected):
    assert expected in error_of("generate", "x", "--model", checkpoint, *options)


def test_no_prompt_is_one_line(error_of, checkpoint):
    assert "The prompt is empty" in error_of("generate", "", "--model", checkpoint)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("two\nlines"), "two lines"),
        (OptionError("{max_new_tokens} is {}; see {seed}", "{top_k}"), "--max-new-tokens is {top_k}; see --seed"),
        (PermissionError(13, "Permission denied", "/some/folder"), "/some/folder: Permission denied"),
        (OSError("no space"), "no space"),
        (MemoryError(), "MemoryError"),
        (ModuleNotFoundError("No module named 'zstandard'", name="zstandard"), "zstandard is not installed"),
    ],
)
def test_what_a_stage_raises_is_one_line(error_of, monkeypatch, raised, expected):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(btlm.plan.info, "run_info", fail)
    assert error_of("info").startswith(f"btlm: error: {expected}")


def test_a_loss_that_is_not_finite_is_one_line(error_of, monkeypatch):
    def diverge(*_, **__):
        raise NotFinite("Step 7: loss nan, gradient norm nan; nothing was updated.", [])

    monkeypatch.setattr(btlm.train.command, "run_training", diverge)
    told = error_of("train", "r.yaml", "--data", "d", "--output", "o")
    assert told == "btlm: error: Step 7: loss nan, gradient norm nan; nothing was updated.\n"


def test_a_terminated_run_keeps_its_status(monkeypatch, capsys):
    def terminated(*_, **__):
        raise SystemExit(143)

    monkeypatch.setattr(btlm.train.command, "run_training", terminated)
    with pytest.raises(SystemExit) as ended:
        main(["train", "r.yaml", "--data", "d", "--output", "o"])
    assert ended.value.code == 143
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr(btlm.plan.info, "run_info", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        main(["info"])


def test_interruption_is_quiet(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(btlm.plan.info, "run_info", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "")


# The command as a process


def test_a_reader_that_goes_away_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate()[1] == ""
    assert process.returncode == 141


def test_a_mistake_ends_the_process_with_2():
    process = start("generate", "--nonsense", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate() == ("", "btlm: error: unrecognized arguments: --nonsense (see --help)\n")
    assert process.returncode == 2


@pytest.mark.slow
def test_a_prompt_through_a_pipe(checkpoint):
    options = ["--model", str(checkpoint), "--max-new-tokens", "4", "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("generate", *options, **pipes)
    out, err = process.communicate("Grüße\n")
    assert process.returncode == 0
    assert out.startswith("Grüße")
    assert [line.split(":")[0] for line in err.splitlines()] == ["btlm", "btlm"]


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("btlm.convert.quantize.quantize", ["quantize", "model", "copy"]),
        ("btlm.convert.gguf.export_gguf", ["export-gguf", "model", "copy.gguf"]),
        ("btlm.evaluate.bench.run_bench", ["bench"]),
    ],
)
def test_sigterm_lets_a_stage_clear_up(monkeypatch, stage, command):
    """A second SIGTERM does not disturb it: a shell signals a process group, and a supervisor every process."""
    cleared = []

    def terminated(*_, **__):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleared.append(True)

    monkeypatch.setattr(stage, terminated)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert (ended.value.code, cleared) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "command",
    [
        "train btlm-tiny --data absent --output absent",
        "transfer btlm-proxy-40m --data absent --output absent --trials 1",
        "coord-check --output absent",
        "data prepare absent --output absent",
    ],
)
def test_a_command_that_draws_at_its_end_asks_for_matplotlib_first(error_of, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("btlm.plots.find_spec", lambda _: None)
    told = "btlm: error: matplotlib is not installed; get it with pip install '.[all]' in a clone of btlm\n"
    assert error_of(*command.split()) == told
