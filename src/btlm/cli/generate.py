"""`btlm generate`."""

from btlm.checkpoint.adapter import Adapted
from btlm.engine.options import GenerationOptions
from btlm.generate.options import Run
from btlm.settings import hints

from .options import Parser, given, options_of
from .stopping import sigterm_unwinds


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm generate [PROMPT ...] [options]",
        "Continue a prompt. The text goes to standard output as it comes, all else to\nstandard error.",
        """  btlm generate "Albert Einstein was known for"
  btlm generate --temperature 0.8 --top-p 0.95 --seed 1 "Once upon a time"
  btlm generate --model runs/tiny/model --num-beams 4 "The capital of France is"
  btlm generate --prompt-file report.txt --context-scaling dynamic > out.txt""",
    )
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="words, joined by spaces; standard input if none or -"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="text file to take the prompt from")
    parser.add_options(Run, "model")
    parser.add_options(Adapted)
    parser.add_options(GenerationOptions, "choice of tokens (default: always the most probable)")
    arguments = parser.parse(argv)
    options = options_of(GenerationOptions, arguments)
    options_of(Run, arguments)
    chosen = given(arguments, [*hints(Run), *hints(Adapted)])
    if arguments.prompt_file is not None:
        chosen["prompt_file"] = arguments.prompt_file

    from btlm.generate.continue_prompt import run_generate

    with sigterm_unwinds():  # merged adapters are in a temporary folder
        run_generate(prompt=arguments.prompt, options=options, **chosen)
