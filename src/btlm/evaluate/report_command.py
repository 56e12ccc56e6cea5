"""The command `btlm report`: files of results as one page of HTML that needs nothing else."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from btlm.console import note, plural
from btlm.files import write_text

from .report_data import read_evidence
from .report_page import page


def run_report(results: Sequence[Path | str], output: Path | str = "report.html") -> str:
    """Write a page.

    Args:
        results: Files of results, ours and those of lm-evaluation-harness, and folders of training runs.
        output: File to write.

    Returns:
        The page.

    Raises:
        ResultsError: A file cannot be used, or two files contradict each other.
    """
    from jinja2 import Environment, StrictUndefined

    evidence = read_evidence(results)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("btlm.evaluate").joinpath("templates/report.html.j2").read_text("utf-8"))
    text = template.render(page(evidence))
    write_text(Path(output), text)
    note(
        f"wrote {output}: {plural(len(evidence.rows), 'result')} of {plural(len(evidence.models), 'model')}, "
        f"{len(text.encode()) / 1e3:,.0f} kB"
    )
    return text
