"""Arguments of the commands."""

from jsonargparse import ArgumentParser, Namespace

from btlm import __version__

from .data_arguments import data_parser
from .parser import new_parser, number, whole


def parse(argv: list[str]) -> tuple[str, Namespace]:
    """The command and its arguments. `data` is parsed by itself: jsonargparse loses errors of commands of commands."""
    if argv[0] == "data":
        return "data", data_parser().parse_args(argv[1:] or ["--help"])
    arguments = _parser().parse_args(argv)
    return arguments.command, arguments[arguments.command]


def _parser() -> ArgumentParser:
    parser = new_parser(
        "COMMAND ...", "Train, run and inspect language models of the BTLM family.", version=__version__
    )
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND", description=None)
    commands.add_subcommand("generate", _generate_parser(), help="continue a prompt")
    commands.add_subcommand("info", _info_parser(), help="show the shape, muP and cost of a model or a recipe")
    commands.add_subcommand("quantize", _quantize_parser(), help="write a copy of a model in four or eight bits")
    commands.add_subcommand("export-gguf", _export_gguf_parser(), help="write a model for llama.cpp")
    commands.add_subcommand("bench", _bench_parser(), help="measure memory and speed of models")
    commands.add_subcommand("train", _train_parser(), help="train a model by a recipe")
    commands.add_subcommand("coord-check", _coord_check_parser(), help="check muP: sizes against width")
    commands.add_subcommand("transfer", _transfer_parser(), help="tune on a narrow proxy for a wide model")
    commands.add_subcommand("data", new_parser("data COMMAND ...", ""), help="turn documents into training data")
    return parser


def _generate_parser() -> ArgumentParser:
    parser = new_parser(
        "generate [PROMPT ...] [options]",
        "Continue a prompt. The text goes to standard output as it comes, all else to\nstandard error.",
        epilog="""examples:
  btlm generate "Albert Einstein was known for"
  btlm generate --temperature 0.8 --top-p 0.95 --seed 1 "Once upon a time"
  btlm generate --model runs/tiny/model --num-beams 4 "The capital of France is"
  btlm generate --prompt-file report.txt --context-scaling dynamic > out.txt""",
    )
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="words, joined by spaces; standard input if none or -"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="take the prompt from a text file")
    parser.add_argument(
        "--max-new-tokens", type=whole, metavar="N", help="end after N tokens if the text has not ended (default: 128)"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL", help="checkpoint folder or Hugging Face id (default: the bundled one)"
    )
    model.add_argument(
        "--engine", metavar="E", help="btlm, transformers, or auto: btlm for all that it can do (default)"
    )
    model.add_argument("--dtype", metavar="D", help="bfloat16, float16, float32 or auto, as stored (default)")
    model.add_argument(
        "--cache-dtype",
        metavar="D",
        help="of keys and values: int4, int8, bfloat16, float32 or auto, int8 for quantized models (default)",
    )
    model.add_argument("--threads", type=whole, metavar="N", help="(default: one a processor)")
    model.add_argument(
        "--kernels", metavar="K", help="native, torch, an instruction path, or auto, the fastest here (default)"
    )
    model.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps ... or auto, the fastest here (default)")
    model.add_argument(
        "--context-scaling",
        metavar="S",
        help="for text longer than the training length: dynamic, a factor above 1, or none, as stored (default)",
    )

    choice = parser.add_argument_group("choice of tokens (default: always the most probable)")
    choice.add_argument("--temperature", type=number, metavar="T", help="sample; below 1 safer, above 1 wilder")
    choice.add_argument(
        "--top-p", type=number, metavar="P", help="sample from the top tokens with probability P in all"
    )
    choice.add_argument("--top-k", type=whole, metavar="K", help="sample from the top K tokens")
    choice.add_argument("--seed", type=whole, metavar="N", help="make the samples repeatable")
    choice.add_argument("--num-beams", type=whole, metavar="N", help="search N beams; the text comes at the end")
    choice.add_argument(
        "--repetition-penalty", type=number, metavar="X", help="above 1: prefer tokens that the text does not have"
    )
    choice.add_argument("--no-repeat-ngram-size", type=whole, metavar="N", help="write no N tokens in a row twice")
    choice.add_argument(
        "--lookup-tokens",
        type=whole,
        metavar="N",
        help="guess up to N tokens from the text itself and check them together: the same text, faster; 0 for none "
        "(default: 3)",
    )
    return parser


def _info_parser() -> ArgumentParser:
    parser = new_parser(
        "info [MODEL] [--json]",
        "Show what a model is and what it costs: shape, muP, parameters, FLOPs, memory.\nIts weights are not loaded.",
        epilog="""examples:
  btlm info
  btlm info recipes/btlm-3b.yaml
  btlm info --json runs/tiny/model""",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder, Hugging Face id, or recipe (.yaml) (default: the bundled model)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _quantize_parser() -> ArgumentParser:
    parser = new_parser(
        "quantize MODEL OUT [options]",
        "Write a copy of a model whose weights take four bits (or eight), read tensor by\ntensor.",
        epilog="""examples:
  btlm quantize cerebras/btlm-3b-8k-base btlm-3b-4bit
  btlm quantize runs/mine/model mine-4bit --calibrate some-text.txt
  btlm quantize runs/mine/model mine-8bit --bits 8""",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face id")
    parser.add_argument("output", metavar="OUT", help="folder that receives the copy; must not exist")
    parser.add_argument("--bits", type=whole, metavar="N", default=4, help="of the blocks: 4 (default) or 8")
    parser.add_argument(
        "--group-size", type=whole, metavar="N", default=128, help="weights that share a scale: 64 or 128 (default)"
    )
    parser.add_argument(
        "--table-bits", type=whole, metavar="N", default=8, help="of the token table and head: 8 (default) or 4"
    )
    parser.add_argument(
        "--calibrate", metavar="FILE", help="text to choose the weights by (GPTQ); without it each is rounded by itself"
    )
    return parser


def _export_gguf_parser() -> ArgumentParser:
    parser = new_parser(
        "export-gguf MODEL OUT.gguf [--type T]",
        "Write a model for llama.cpp, in its architecture `jais`.",
        epilog="""examples:
  btlm export-gguf cerebras/btlm-3b-8k-base btlm-3b.gguf --type Q4_0""",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face id")
    parser.add_argument("output", metavar="OUT.gguf", help="receives the model; must not exist")
    parser.add_argument("--type", metavar="T", default="F16", help="F16 (default), Q8_0, Q4_0 or F32")
    return parser


def _bench_parser() -> ArgumentParser:
    parser = new_parser(
        "bench [MODEL ...] [options]",
        "Measure memory and speed of models by dtype and context; print a table and draw\ntwo plots.",
        epilog="""examples:
  btlm bench --output bench
  btlm bench btlm-3b llama-7b --dtypes 4bit --contexts 512,8192
  btlm bench runs/mine/model mine-4bit --contexts 2048""",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=["btlm-3b"],
        help="checkpoint folders, or shapes with random weights: btlm-3b (default), llama-7b",
    )
    parser.add_argument(
        "--dtypes", metavar="D,D", default="4bit", help="of shapes: 4bit (default), 8bit, bfloat16, float32"
    )
    parser.add_argument("--contexts", metavar="N,N", default="512,2048", help="tokens (default: 512,2048)")
    parser.add_argument("--new-tokens", type=whole, metavar="N", default=32, help="to decode (default: 32)")
    parser.add_argument("--cache-dtype", metavar="D", default="auto", help="as of btlm generate")
    parser.add_argument("--threads", type=whole, metavar="N", help="(default: one a processor)")
    parser.add_argument("--output", metavar="FOLDER", help="receives bench.json, figure-1.png and figure-2.png")
    return parser


def _train_parser() -> ArgumentParser:
    parser = new_parser(
        "train RECIPE --data FOLDER --output FOLDER [options]",
        "Train a model by a recipe. The same command continues an interrupted run.",
        epilog="""examples:
  btlm train recipes/btlm-tiny.yaml --data shards --output runs/tiny
  btlm train recipes/btlm-3b.yaml --plan
  btlm train recipes/continue.yaml --set start.model=runs/tiny/model \\
      --data shards --output runs/more
  torchrun --nproc-per-node 8 -m btlm train recipes/btlm-3b.yaml \\
      --data shards --output runs/3b""",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--data", metavar="FOLDER", help="token shards, see btlm data prepare")
    parser.add_argument("--output", metavar="FOLDER", help="receives the model, checkpoints, metrics and loss curve")
    parser.add_argument(
        "--device", metavar="D", default="auto", help="device of torch, or auto: a GPU where there is one (default)"
    )
    parser.add_argument(
        "--set",
        action="append",
        type=str,
        metavar="KEY=VALUE",
        help="change a value of the recipe, as in optimizer.lr=1.0e-3; may be repeated",
    )
    plan = parser.add_argument_group("plan")
    plan.add_argument("--plan", action="store_true", help="print cost and memory of the run, and do nothing else")
    plan.add_argument("--mfu", type=number, metavar="X", default=0.4, help="expected share of the peak (default: 0.4)")
    plan.add_argument(
        "--peak-tflops", type=number, metavar="X", default=989.0, help="of a device (default: 989, H100 in bf16)"
    )
    plan.add_argument(
        "--devices",
        type=whole,
        nargs="+",
        metavar="N",
        help="numbers of devices to expect times for (default: those that can share the batches)",
    )
    return parser


def _coord_check_parser() -> ArgumentParser:
    parser = new_parser(
        "coord-check [RECIPE] [options]",
        "Check that the sizes of activations and of their changes go with the width as\nmuP says. Exit status 1 where "
        "one does not.",
        epilog="""examples:
  btlm coord-check --output coord
  btlm coord-check recipes/btlm-3b.yaml --data shards
  btlm coord-check --ablate matrix-lr""",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file (default: BTLM's values)")
    parser.add_argument(
        "--widths", type=whole, nargs="+", metavar="N", default=[64, 128, 256, 512, 1024], help="(default: 64 to 1024)"
    )
    parser.add_argument("--steps", type=whole, metavar="N", default=4, help="of the optimizer (default: 4)")
    parser.add_argument("--seeds", type=whole, metavar="N", default=2, help="models of each width (default: 2)")
    parser.add_argument("--layers", type=whole, metavar="N", default=2, help="of each model (default: 2)")
    parser.add_argument("--heads", type=whole, metavar="N", default=1, help="the same at every width (default: 1)")
    parser.add_argument("--data", metavar="FOLDER", help="token shards to take the batch from (default: random tokens)")
    parser.add_argument("--output", metavar="FOLDER", help="receives coord-check.png and coord-check.json")
    parser.add_argument(
        "--ablate",
        metavar="ROW",
        help="leave a row of the table out: hidden-init, residual-init, matrix-lr, scores, logits, embedding-init, "
        "embedding-multiplier, embedding-lr, bias-lr, or all (standard parametrization)",
    )
    parser.add_argument("--device", metavar="D", default="auto", help="device of torch (default: auto)")
    return parser


def _transfer_parser() -> ArgumentParser:
    parser = new_parser(
        "transfer RECIPE --data FOLDER --output FOLDER --trials N [options]",
        "Tune hyperparameters on a narrow proxy, and write the recipe of a wide model.\nThe same command continues an "
        "interrupted search.",
        epilog="""example:
  btlm transfer recipes/btlm-proxy-40m.yaml --data shards --output search \\
      --trials 64 --target recipes/btlm-3b.yaml""",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of the proxy, with mup_base_width")
    parser.add_argument("--data", metavar="FOLDER", required=True, help="token shards with held-out text")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="receives the search, recipe.yaml and a plot")
    parser.add_argument("--trials", type=whole, metavar="N", required=True, help="finished trials in all")
    parser.add_argument("--workers", type=whole, metavar="N", default=1, help="trials at a time (default: 1)")
    parser.add_argument("--target", metavar="RECIPE", help="recipe that gets the values (default: the proxy's)")
    parser.add_argument("--seed", type=whole, metavar="N", default=1, help="of the values (default: 1)")
    parser.add_argument("--device", metavar="D", default="auto", help="device of torch (default: auto)")
    space = parser.add_argument_group("search space (lowest and highest value, log-uniform)")
    for flag, destination, default in (
        ("lr", "lr", "0.001 0.1"),
        ("initializer-range", "initializer_range", "0.02 0.3"),
        ("embeddings-scale", "mup_embeddings_scale", "3 60"),
        ("output-alpha", "mup_output_alpha", "0.5 10"),
    ):
        space.add_argument(
            f"--{flag}",
            dest=destination,
            type=number,
            nargs=2,
            metavar=("LOW", "HIGH"),
            help=f"(default: {default})",
        )
    return parser


def setting(text: str) -> tuple[str, object]:
    """Key and value of ``--set``; the value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} is not of the form KEY=VALUE, as in optimizer.lr=1.0e-3.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML ({' '.join(str(error).split())}).") from error
