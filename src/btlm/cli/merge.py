"""`btlm merge`."""

from btlm.checkpoint.adapter import Adapted
from btlm.settings import hints

from .options import Parser, given
from .stopping import sigterm_unwinds


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm merge ADAPTER OUT [--base MODEL]",
        "Merge adapters (LoRA) into the model that they change, and write the result as a\nplain checkpoint.",
        """  btlm merge runs/lora/model runs/lora/merged
  btlm merge my-adapter merged --base cerebras/btlm-3b-8k-base""",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of adapters, with adapter_config.json")
    parser.add_argument("output", metavar="OUT", help="folder that receives the model; must not exist")
    parser.add_options(Adapted)
    arguments = parser.parse(argv)

    from btlm.checkpoint.adapter import merge

    with sigterm_unwinds():
        merge(arguments.adapter, arguments.output, **given(arguments, hints(Adapted)))
