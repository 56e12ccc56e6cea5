"""`btlm serve`."""

from btlm.checkpoint.adapter import Adapted
from btlm.serve.options import Serve

from .options import Parser, given, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm serve [MODEL] [options]",
        "Answer HTTP requests that clients of OpenAI's API send, and show a playground at\nthe same address. The log "
        "goes to standard error.",
        """  btlm serve
  btlm serve runs/btlm-3b-4bit --context 8192 --max-requests 8
  btlm serve cerebras/btlm-3b-8k-base --host 0.0.0.0 --api-key-file keys.txt
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "Albert Einstein was known for"}'""",
    )
    help_of_model = "checkpoint folder, folder of adapters, or Hugging Face id (default: the bundled model)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=help_of_model)
    parser.add_options(Adapted)
    parser.add_options(Serve)
    arguments = parser.parse(argv)
    settings = options_of(Serve, arguments)

    from btlm.checkpoint.locate import BUNDLED_MODEL
    from btlm.serve.command import run_serve

    run_serve(arguments.model or BUNDLED_MODEL, settings, **given(arguments, ["base"]))
