"""`results.json`: what is written is read again, and what is damaged is refused by row."""

import json
from dataclasses import replace
from typing import Any

import pytest

from btlm.checkpoint.open import Checkpoint
from btlm.errors import ResultsError
from btlm.evaluate.results import Origin, model_digest, read_results, write_results
from tests.checkpoint.tiny import save_tiny, set_config


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return Origin.of(Checkpoint.open(save_tiny(tmp_path_factory.mktemp("model"))))


def test_rows_are_read_as_they_were_written(origin, tmp_path):
    rows = [
        origin.result("piqa", "accuracy", 0.5, "", 1838, standard_error=0.01, shots=0, partial=True),
        origin.result("perplexity", "bits_per_byte", 1, "bits", 7, settings={"context": 8}),
    ]
    write_results(tmp_path / "results.json", rows)
    assert read_results(tmp_path / "results.json") == rows
    assert rows[0].versions["btlm"]
    assert rows[0].machine
    assert rows[0].time.endswith("Z")
    with pytest.raises(ValueError, match="piqa, accuracy, is nan, which is no result"):
        write_results(tmp_path / "other.json", [replace(rows[0], value=float("nan"))])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_digest_is_that_of_configuration_and_weights(tmp_path):
    folder = save_tiny(tmp_path / "model")
    before = model_digest(Checkpoint.open(folder))
    assert model_digest(Checkpoint.open(folder)) == before
    set_config(folder, mup_output_alpha=3.0)
    assert model_digest(Checkpoint.open(folder)) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.update(format=2), "has the format 2, and this version of btlm reads 1; measure again."),
        (lambda file: file.pop("rows"), "holds no results; it needs the keys format and rows."),
        (lambda file: file["rows"].append(3), "row 2 is 3, not an object."),
        (lambda file: file["rows"][0].pop("n"), "row 1: n is missing."),
        (lambda file: file["rows"][0].update(extra=1), "row 1: extra is unknown."),
        (lambda file: file["rows"][0].update(value="much"), "row 1: value is 'much', not int or float."),
        (lambda file: file["rows"][0].update(n=True), "row 1: n is True, not int."),
        (lambda file: file["rows"][0].update(value=float("inf")), "row 1: value is inf, which is no result."),
    ],
)
def test_a_damaged_file_is_refused(origin, tmp_path, change, message):
    path = tmp_path / "results.json"
    write_results(path, [origin.result("piqa", "accuracy", 0.5, "", 10)])
    content: dict[str, Any] = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ResultsError) as error:
        read_results(path)
    assert str(error.value).endswith(message)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ResultsError, match="cannot be read as JSON"):
        read_results(tmp_path / "results.json")
    with pytest.raises(ResultsError, match="cannot be read as JSON"):
        read_results(tmp_path / "none.json")
