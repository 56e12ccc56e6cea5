"""`btlm report`."""

from .options import Parser


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm report RESULTS ... [--output FILE]",
        "Put results of one or several models on one page: tables and figures, with the command,\n"
        "versions and machine of every number. The page needs no network.",
        """  btlm report results.json positions.json needle.json --output report.html
  btlm report mine.json bench/ runs/mine pythia/results_2026-01-01.json""",
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="results.json, a folder with one, a file of lm-evaluation-harness, or the folder of a training run",
    )
    parser.add_argument("--output", metavar="FILE", default="report.html", help="page to write (default: report.html)")
    arguments = parser.parse(argv)

    from btlm.console import plain_warnings
    from btlm.evaluate.report_command import run_report

    with plain_warnings():
        run_report(arguments.results, arguments.output)
