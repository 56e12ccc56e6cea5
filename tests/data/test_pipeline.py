import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from btlm.cli import main
from btlm.data import TokenShards
from btlm.data.inspect import run_inspect
from btlm.data.pipeline import run_clean, run_dedup, run_mix, run_prepare, run_tokenize
from btlm.data.recipe import Clean, DataRecipe, Dedup, Execution, Mix, Read
from btlm.data.report import report_rows, report_tables
from btlm.data.stage import load_stage
from btlm.settings import plain
from tests.data.corpus import text, write_corpus

RECIPE = DataRecipe(read=Read(part_bytes=30_000), mix=Mix(holdout=0.05, partition_bytes=60_000, weights={"Web": 1.5}))
OPTIONS = ["--read.part_bytes=30000", "--mix.holdout=0.05", "--mix.partition_bytes=60000", "--mix.weights={Web: 1.5}"]


def shard_bytes(folder):
    """The files that the pipeline promises to reproduce exactly: shards and manifest."""
    files = [path for path in Path(folder).iterdir() if path.suffix in {".bin", ".npy"} or path.name == "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "data"
    run_prepare([corpus], output, RECIPE, Execution(workers=1))
    return output


def test_the_shards_hold_the_documents(prepared):
    shards = TokenShards(prepared / "shards")
    assert shards.sources == ["Books", "Code", "Web"]
    assert len(shards.manifest["splits"]["train"]["shards"]) > 2
    history = shards.manifest["history"]
    counts = history["clean"]["sources"]["Books"]
    assert (counts["documents"], counts["short_documents"]) == (40, 4)
    duplicates = sum(entry.get("duplicate_documents", 0) for entry in history["dedup"]["sources"].values())
    assert 12 <= duplicates <= 24, "12 exact copies are planted, and 12 that are nearly so"
    for split, content in shards.manifest["splits"].items():
        assert content["tokens"] == shards.num_tokens(split)
        assert [shard["name"] for shard in content["shards"]] == [
            f"{split}-{index:05d}" for index in range(len(content["shards"]))
        ]
        assert content["documents"] == sum(
            history["mix"]["sources"][s].get(f"{split}_documents", 0) for s in shards.sources
        )
        ends = shards.tokens(split, 0, content["tokens"]) == 50256
        assert ends.sum() == content["documents"]
        assert ends[-1]


def test_the_result_does_not_depend_on_workers_or_the_order_of_files(corpus, prepared, tmp_path):
    # The corpus is in another folder, its files are given one by one in another order, and have other times of change.
    files = [tmp_path / "copy" / path.name for path in sorted(corpus.iterdir(), reverse=True)]
    files[0].parent.mkdir()
    for file in files:
        shutil.copyfile(corpus / file.name, file)
    run_prepare(files, tmp_path / "out", RECIPE, Execution(workers=3))
    assert shard_bytes(tmp_path / "out/shards") == shard_bytes(prepared / "shards")


def test_stages_alone_do_what_they_do_together(corpus, prepared, tmp_path):
    execution = Execution(workers=1)
    run_clean([corpus], tmp_path / "a", RECIPE.read, RECIPE.clean, execution)
    run_dedup([tmp_path / "a"], tmp_path / "b", Read(), RECIPE.dedup, execution)
    run_mix([tmp_path / "b"], tmp_path / "c", Read(), RECIPE.mix, execution)
    run_tokenize([tmp_path / "c"], tmp_path / "d", Read(), execution)
    assert shard_bytes(tmp_path / "d") == shard_bytes(prepared / "shards")
    assert (tmp_path / "d/report.txt").read_text() == (prepared / "report.txt").read_text()


def test_a_stage_alone_on_raw_documents(corpus, tmp_path):
    run_dedup([corpus], tmp_path / "out", Read(), Dedup(), Execution(workers=1))
    report = {row["source"]: row for row in json.loads((tmp_path / "out/report.json").read_text())}
    assert report["all"]["documents"] == 120
    assert report["all"]["kept_documents"] + report["all"]["duplicate_documents"] == 120
    assert "short_documents" not in report["all"]
    # Other settings start only this stage over, not the reading.
    with pytest.raises(ValueError, match=r"dedup.bands was 9, is 3"):
        run_dedup([corpus], tmp_path / "out", Read(), Dedup(bands=3), Execution(workers=1))
    run_dedup([corpus], tmp_path / "out", Read(), Dedup(bands=3), Execution(workers=1, force=True))
    assert (tmp_path / "out/log.txt").read_text().count("read: 3 tasks") == 1
    run_tokenize([tmp_path / "out"], tmp_path / "shards", Read(), Execution(workers=1))
    assert list(TokenShards(tmp_path / "shards").manifest["splits"]) == ["train"]


def test_the_same_command_again_does_nothing(corpus, prepared):
    before = {path: path.stat().st_mtime_ns for path in (prepared / "shards").iterdir()}
    run_prepare([corpus], prepared, RECIPE, Execution(workers=1))
    assert {path: path.stat().st_mtime_ns for path in (prepared / "shards").iterdir()} == before
    assert "clean: complete already" in (prepared / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": Clean(min_characters=100)}, "clean.min_characters was 200, is 100"),
        ({"dedup": Dedup(threshold=0.5)}, "dedup.bands was 9, is 25"),
        ({"mix": Mix(seed=9)}, "mix.seed was 1, is 9"),
    ],
)
def test_another_recipe_is_refused(corpus, prepared, change, message):
    with pytest.raises(ValueError, match=message):
        run_prepare([corpus], prepared, DataRecipe(**{**vars(RECIPE), **change}), Execution(workers=1))


def test_an_output_within_the_input_is_refused(corpus):
    with pytest.raises(ValueError, match=r"out lies within the input .*; give an output elsewhere"):
        run_prepare([corpus], corpus / "out", RECIPE, Execution(workers=1))


def test_settings_that_a_stage_would_not_use_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="is the output of a stage, to which the settings of `read` do not apply"):
        run_dedup([prepared / "clean"], tmp_path / "out", Read(text_field="x"), Dedup(), Execution(workers=1))


def test_stages_that_another_cannot_work_on_are_refused(corpus, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"clean is the output of a stage, which must be the only input"):
        run_dedup([prepared / "clean", corpus], tmp_path / "out", Read(), Dedup(), Execution(workers=1))
    with pytest.raises(ValueError, match=r"shards holds token shards; give documents, or the output of a stage before"):
        run_tokenize([prepared / "shards"], tmp_path / "out", Read(), Execution(workers=1))
    with pytest.raises(ValueError, match="holds no complete stage; give the output of a btlm data command"):
        run_inspect(corpus)


def test_names_of_sources_that_mean_something_elsewhere(tmp_path):
    rng = random.Random(0)
    names = [
        "[/x] foo",
        "$\\foo$",
        "a/b",
        "RedPajamaC4",
        "C4",
        "RedPajama",
        "all",
        "\x1b[31m",
        "数据",
        "'quoted'",
        "n" * 300,
    ]
    rows = [{"text": text(rng), "source": name} for name in names for _ in range(2)]
    folder = tmp_path / "source=zzz"
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_prepare([folder], tmp_path / "document=value" / "out", DataRecipe(), Execution(workers=1))
    assert TokenShards(tmp_path / "document=value/out/shards").sources == sorted(names)
    assert main(["data", "inspect", str(tmp_path / "document=value/out")]) == 0


def test_a_path_that_duckdb_takes_for_a_pattern_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"contains \[ \], which DuckDB takes for a pattern"):
        run_prepare([corpus], tmp_path / "out[1]", RECIPE, Execution(workers=1))


def test_a_change_is_noticed_in_either_of_two_files_of_one_name(tmp_path):
    files = [tmp_path / folder / "x.jsonl" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps({"text": f"{file.parent.name} document " * 30}) + "\n")
    for changed in files:
        output = tmp_path / f"out-{changed.parent.name}"
        run_clean(files, output, Read(), Clean(), Execution(workers=1))
        changed.write_text(json.dumps({"text": "another document " * 30}) + "\n")
        with pytest.raises(ValueError, match=r"input.x.jsonl has changed"):
            run_clean(files, output, Read(), Clean(), Execution(workers=1))


def test_changed_input_is_refused_unless_forced(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    run_prepare([corpus], tmp_path / "out", RECIPE, Execution(workers=1))
    before = shard_bytes(tmp_path / "out/shards")
    with (corpus / "web.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a new document " * 50}) + "\n")
    with pytest.raises(ValueError, match=r"other settings or input \(input.corpus/web.jsonl has changed"):
        run_prepare([corpus], tmp_path / "out", RECIPE, Execution(workers=1))
    assert shard_bytes(tmp_path / "out/shards") == before
    run_prepare([corpus], tmp_path / "out", RECIPE, Execution(workers=1, force=True))
    assert shard_bytes(tmp_path / "out/shards") != before


def test_after_a_power_cut_no_file_only_counts_as_whole(corpus, tmp_path, power_cut, monkeypatch):
    monkeypatch.setattr("btlm.data.stage.shutil.rmtree", lambda *_, **__: None)  # what a stage removes is seen too
    (tmp_path / "eval.jsonl").write_text('{"q": "no text has it"}')
    recipe = DataRecipe(**{**vars(RECIPE), "mix": Mix(decontaminate=[str(tmp_path / "eval.jsonl")])})
    run_prepare([corpus], tmp_path / "out", recipe, Execution(workers=1))
    assert power_cut.lost == []
    written = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    others = {path.relative_to(tmp_path / "out") for path in written - set(power_cut.renamed)}
    # The log grows, a database lasts for one task, and a mark, which has no content, is set after its task's result.
    assert {str(path) for path in others if not {"scratch", "completions"} & set(path.parts)} == {"log.txt"}
    assert any("scattered" in path.parts for path in written)
    # What marks a stage as complete comes last, and the manifest after the shards.
    for stage in ("clean", "dedup", "mix", "shards"):
        names = [path.name for path in power_cut.renamed if path.is_relative_to(tmp_path / "out" / stage)]
        assert (names[0], names[-1], names.count("stage.json")) == ("begun.json", "stage.json", 1)
    assert names[-2] == "manifest.json"


def command(corpus, output, *options):
    return [sys.executable, "-m", "btlm", "data", "prepare", str(corpus), "--output", str(output), *OPTIONS, *options]


def killed(argv, is_time):
    """Run a command, and kill it and all its workers when ``is_time()``; returns whether it was still running then."""
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        if is_time():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    return False


def test_killed_in_any_stage_it_goes_on_and_writes_the_same_bytes(corpus, prepared, tmp_path):
    output = tmp_path / "out"
    for pattern in ("clean/documents/*", "dedup/pairs/*", "mix/scattered/*", "shards/*.bin"):
        assert killed(command(corpus, output, "--workers=2"), lambda: any(output.glob(pattern)))  # noqa: B023
    subprocess.run(command(corpus, output, "--workers=2"), check=True, capture_output=True)
    assert shard_bytes(output / "shards") == shard_bytes(prepared / "shards")
    assert not list(output.rglob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are told to end with their parent by Linux")
def test_workers_end_with_a_command_that_is_killed(corpus, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(corpus, output, "--workers=2"), stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(output.glob("clean/documents/*")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    for _ in range(200):
        left = [other.pid for other in psutil.process_iter() if session_of(other.pid) == process.pid]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def session_of(process):
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_writes_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=3000)
    whole = command(corpus, tmp_path / "whole", "--workers=2")
    started = time.monotonic()
    subprocess.run(whole, check=True, capture_output=True)
    seconds = time.monotonic() - started
    rng = random.Random(1)
    kills = fresh = 0
    while kills < 20:
        # After a run that has ended, the next one starts anew.
        output = tmp_path / f"killed{fresh}"
        moment = time.monotonic() + rng.uniform(0, seconds)
        if killed(command(corpus, output, "--workers=2"), lambda: time.monotonic() > moment):  # noqa: B023
            kills += 1
        else:
            fresh += 1
    for run in range(fresh + 1):
        output = tmp_path / f"killed{run}"
        subprocess.run(command(corpus, output, "--workers=2"), check=True, capture_output=True)
        assert shard_bytes(output / "shards") == shard_bytes(tmp_path / "whole/shards")


@pytest.mark.parametrize(
    ("size", "file"),
    [
        (3_000, r"clean/documents/000000-0000\.parquet"),  # written by pyarrow
        (9_000, r"\S+"),  # by DuckDB, which does not name the file
        (20_000, r"shards/train-00000\.bin"),  # by Python
    ],
)
def test_a_disk_that_is_full_is_one_line_and_then_goes_on(corpus, prepared, tmp_path, size, file):
    def limit():
        # No file can grow beyond this size, as on a disk that is nearly full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    failed = subprocess.run(command(corpus, tmp_path / "out", "--workers=1"), preexec_fn=limit, capture_output=True)
    last = failed.stderr.decode().splitlines()[-1]
    assert failed.returncode == 2, failed.stderr.decode()
    problem = r"cannot be written: File too large\. Make room there, and run the same command again\."
    assert re.fullmatch(rf"btlm: error: {tmp_path}/out/{file} {problem}", last)
    assert b"Traceback" not in failed.stderr
    subprocess.run(command(corpus, tmp_path / "out", "--workers=1"), check=True, capture_output=True)
    assert shard_bytes(tmp_path / "out/shards") == shard_bytes(prepared / "shards")


def test_a_disk_that_will_be_full_is_told_beforehand(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    run_prepare([corpus], tmp_path / "out", DataRecipe(), Execution(workers=1))
    assert re.search(
        r"warning: all stages take about 0\.\d MB, and the disk has 0\.1 MB free",
        (tmp_path / "out/log.txt").read_text(),
    )


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=30)
    (corpus / "code.jsonl.zst").unlink()
    options = ["--dedup.bands=2", "--workers=2"]
    subprocess.run(command(corpus, tmp_path / "local", *options), check=True, capture_output=True)
    ray = subprocess.run(command(corpus, tmp_path / "ray", *options, "--executor=ray"), capture_output=True)
    assert ray.returncode == 0, ray.stderr.decode()
    assert shard_bytes(tmp_path / "ray/shards") == shard_bytes(tmp_path / "local/shards")


# Stand-ins for the commands of a Slurm cluster that is only this machine; the jobs of an array run one after the other.
SLURM = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
array = re.search("array=0-([0-9]+)", open(script).read())
for index in range(int(array[1]) + 1 if array else 0):
    environment = os.environ | dict(SLURM_ARRAY_TASK_ID=str(index), SLURM_NODELIST="here", RUN_OFFSET="0")
    subprocess.run(["bash", script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
""",
    "srun": """#!/bin/bash
while [[ $1 != launch_pickled_pipeline ]]; do shift; done
exec "$@"
""",
    "squeue": "#!/bin/bash\n",
    "scontrol": "#!/bin/bash\necho here\n",
}


@pytest.mark.slow
def test_slurm_writes_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=30)
    (corpus / "code.jsonl.zst").unlink()
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(script.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    options = ["--dedup.bands=2"]
    subprocess.run(command(corpus, tmp_path / "local", *options, "--workers=1"), check=True, capture_output=True)
    slurm = command(corpus, tmp_path / "slurm", *options, "--executor=slurm", "--slurm-partition=cpu")
    result = subprocess.run(slurm, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr.decode()
    assert shard_bytes(tmp_path / "slurm/shards") == shard_bytes(tmp_path / "local/shards")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nowhere", "--output", "out"], "nowhere does not exist"),
        (["prepare", "x.txt", "--output", "out", "--dedup.bands=100"], "dedup.bands x dedup.rows is 1300"),
        (["prepare", "x.txt", "--output", "out", "--dedup.bands=many"], "dedup.bands"),
        (["prepare", "x.txt", "--output", "out", "--executor=spark"], "executor is 'spark'"),
        (["prepare", "x.txt", "--output", "x.txt"], "x.txt is a file; give a folder"),
        (["prepare", "x.txt", "--output", "out", "--recipe=wrong.yaml"], "bandz"),
        (["mix", "x.txt", "--output", "out", "--mix.holdout=2"], "mix.holdout is 2.0"),
        (["inspect", "."], "holds no complete stage"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("some text " * 30)
    Path("wrong.yaml").write_text("dedup:\n  bandz: 3\n")
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("btlm: error: ")
    assert message in error


def test_a_recipe_sets_everything(corpus, tmp_path):
    recipe = "read: {part_bytes: 30000}\nmix: {holdout: 0.05, weights: {Web: 1.5}}\nclean: {min_characters: 0}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    arguments = ["data", "prepare", str(corpus), "--output", str(tmp_path / "out"), "--workers=1"]
    assert main([*arguments, f"--recipe={tmp_path / 'recipe.yaml'}", "--dedup.threshold=0.5"]) == 0
    settings: dict[str, Any] = {}
    for entry in TokenShards(tmp_path / "out/shards").manifest["history"].values():
        settings |= entry["settings"]
    assert settings["read"]["part_bytes"] == 30000
    assert settings["clean"]["min_characters"] == 0
    assert settings["mix"]["weights"] == {"Web": 1.5}
    # A flag after the file overrides it.
    assert (settings["dedup"]["threshold"], settings["dedup"]["rows"]) == (0.5, 5)


def test_every_problem_of_a_recipe_is_told_at_once(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "read: {part_bytes: 0, source: 3}\ndedup: {bandz: 3, threshold: 1}\nmixx: {}\nworkers: 1.5\n"
        "mix: {holdout: 1e-2, weights: {Web: -1, Code: much}, decontaminate: a.jsonl}\n"
    )
    assert main(["data", "prepare", "x", "--output", "y", "--recipe", str(recipe), "--clean.min_characters=-1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sorted(line.removeprefix(f"btlm: error: {recipe}: ").removesuffix(".").split("; ")) == sorted(
        [
            "mixx is not a key of a recipe: did you mean mix?",
            "workers is 1.5, not a whole number of at least 1 (written out, as in 1_000_000)",
            "read.part_bytes is 0, not a whole number of at least 1",
            "read.source is 3, not a text",
            "dedup.bandz is not a key of a recipe: did you mean bands?",
            "dedup.threshold is 1, not a number above 0 and below 1",
            "mix.holdout is '1e-2', not a number in [0, 1) (YAML takes 1e-3 for text: write 1.0e-3)",
            "mix.weights of Web is -1, not a number of at least 0",
            "mix.weights of Code is 'much', not a number of at least 0",
            "mix.decontaminate is 'a.jsonl', not a list of texts",
            "clean.min_characters is -1, not a whole number of at least 0",
        ]
    )


@pytest.mark.parametrize("content", ["dedup: {bands: 2}", "3", "read: {", "read:"])
def test_a_recipe_that_is_not_for_the_command_is_refused(tmp_path, capsys, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    assert main(["data", "mix", "x", "--output", "y", "--recipe", str(recipe)]) == 2
    told = {
        "dedup: {bands: 2}": ": dedup is not used here (only read, mix): leave it out.",
        "3": ": the content is 3, not a mapping.",
        "read: {": " is not a readable recipe: while parsing",
        "read:": ": read is None, not a mapping.",
    }
    assert capsys.readouterr().err.startswith(f"btlm: error: {recipe}{told[content]}")


def test_printed_settings_are_a_recipe(tmp_path, capsys, monkeypatch):
    flags = ["--mix.weights=Web: 1.5, Code: 2", "--mix.decontaminate=a,b", "--workers=3", "--read.source=null"]
    assert main(["data", "mix", "--print_config", *flags]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    called = []
    monkeypatch.setattr("btlm.data.pipeline.run_mix", lambda *arguments: called.append(arguments))
    assert main(["data", "mix", "x", "--output", "y", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    settings = Mix({"Web": 1.5, "Code": 2}, decontaminate=["a", "b"])
    assert called == [(["x"], "y", Read(source="null"), settings, Execution(workers=3))]


def test_the_recipe_of_slimpajama_is_the_defaults(monkeypatch):
    called = []
    monkeypatch.setattr("btlm.data.pipeline.run_prepare", lambda *arguments: called.append(arguments))
    recipe = Path(__file__).parents[2] / "recipes/data/slimpajama.yaml"
    assert main(["data", "prepare", "x", "--output", "y", "--recipe", str(recipe)]) == 0
    assert called == [(["x"], "y", DataRecipe(), Execution())]
    given = yaml.safe_load(recipe.read_text())
    assert given == plain(DataRecipe()), "every setting is there"


def test_the_seed_of_inspect_chooses_the_examples(prepared, capsys):
    shown = []
    for seed in (1, 2, 1):
        assert main(["data", "inspect", str(prepared), "--stage", "clean", f"--seed={seed}"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[2] != shown[1]


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_fits_a_terminal_and_is_safe_to_look_at(tmp_path, capsys, monkeypatch, width):
    """Of a text as much is shown as fits one line, and control characters do not reach the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    body = text(random.Random(0), 300)
    rows = [{"text": f"\x1b[31m{i} [bold]\n{body}", "source": "\x1b]0;title\x07", "id": "\x1b[2J"} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_prepare([tmp_path / "in.jsonl"], tmp_path / "out", DataRecipe(), Execution(workers=1))
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out"), "--stage", "dedup"]) == 0
    shown = capsys.readouterr().out
    texts = [line for line in shown.splitlines() if "[bold]" in line]
    assert len(texts) == 3
    assert {len(line) for line in texts} == {width}
    assert all(line.startswith("    \ufffd[31m") and line.endswith("…") for line in texts)
    assert "\x1b" not in shown
    assert shown.count("\ufffd]0;title\ufffd  \ufffd[2J  (") == 3


def test_inspect_shows_examples_of_everything(prepared, capsys):
    assert main(["data", "inspect", str(prepared), "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "12 short documents" in shown
    assert "clusters of near-duplicates" in shown
    assert "J = 1.00" in shown or "J = 0.9" in shown
    assert "validation documents" in shown
    assert "train: " in shown
    assert main(["data", "inspect", str(prepared), "--stage", "dedup"]) == 0
    assert "short documents" not in capsys.readouterr().out
    assert main(["data", "inspect", str(prepared), "--stage", "filter"]) == 2
    assert "holds no complete stage 'filter'; it has clean, dedup, mix, tokenize" in capsys.readouterr().err


# What is checked before work starts, and what is said at the end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix.decontaminate=absent.jsonl"], "mix.decontaminate: absent.jsonl: No such file or directory"),
        (["--mix.decontaminate=bad.jsonl"], "mix.decontaminate: bad.jsonl, line 1: not JSON"),
        (
            ["--read.source=Web", "--mix.weights=web: 2"],
            "mix.weights names web (did you mean Web?), which the documents",
        ),
        (["--recipe=btlm-tinny"], "btlm-tinny is not a readable recipe: did you mean btlm-tiny?"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "mix"])
def test_a_mistake_is_told_before_anything_is_read(tmp_path, monkeypatch, capsys, command, options, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("not json")
    Path("x.txt").write_text("some text " * 30)
    assert main(["data", command, "x.txt", "--output", "out", "--workers=1", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("out").exists()


def test_sources_are_checked_as_soon_as_they_are_known(corpus, tmp_path):
    recipe = DataRecipe(mix=Mix(weights={"web": 2, "Bokos": 1, "RedPajamaArXiv": 3}))
    known = (
        r"names Bokos \(did you mean Books\?\), RedPajamaArXiv, web \(did you mean Web\?\), .* are Books, Code, Web\.$"
    )
    with pytest.raises(ValueError, match=known):
        run_prepare([corpus], tmp_path / "out", recipe, Execution(workers=1))
    assert not (tmp_path / "out/dedup").exists()


def test_a_weight_may_name_a_source_of_which_nothing_is_left(tmp_path):
    rows = [{"text": "short", "source": "Notes"}, *({"text": f"{i} text " * 50, "source": "Web"} for i in range(3))]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DataRecipe(mix=Mix(weights={"Notes": 2}))
    run_prepare([tmp_path / "in.jsonl"], tmp_path / "out", recipe, Execution(workers=1))
    assert TokenShards(tmp_path / "out/shards").sources == ["Web"]


@pytest.mark.parametrize("library", ["duckdb", "matplotlib", "orjson", "pyarrow", "tiktoken"])
def test_a_library_that_is_missing_is_told_before_anything_is_read(corpus, tmp_path, monkeypatch, capsys, library):
    for module in ("btlm.data.pipeline", "btlm.plots"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == library else name)
    assert main(["data", "prepare", str(corpus), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"btlm: error: {library} is not installed; get it with pip install")
    assert not (tmp_path / "out").exists()


def test_every_shipped_recipe_of_data_works_on_any_text(corpus, tmp_path):
    for name in ("btlm-tiny", "slimpajama"):
        output = tmp_path / name
        assert main(["data", "prepare", str(corpus), f"--output={output}", "--workers=1", f"--recipe={name}"]) == 0
        assert TokenShards(output / "shards").num_tokens("validation") > 0


@pytest.mark.parametrize(
    ("command", "written", "following"),
    [
        ("prepare", "a b/shards", "btlm train btlm-tiny --data 'a b/shards' --output runs/tiny"),
        ("tokenize", "a b", "btlm train btlm-tiny --data 'a b' --output runs/tiny"),
        ("clean", "a b", "btlm data dedup 'a b' --output deduplicated"),
        ("dedup", "a b", "btlm data mix 'a b' --output mixed"),
        ("mix", "a b", "btlm data tokenize 'a b' --output shards"),
    ],
)
def test_a_command_ends_by_naming_the_next(monkeypatch, capsys, command, written, following):
    monkeypatch.setattr(f"btlm.data.pipeline.run_{command}", lambda *_: None)
    assert main(["data", command, "x", "--output", "a b"]) == 0
    assert capsys.readouterr().err == f"btlm: wrote {written}; next: {following}\n"


# The report


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_report_fits_a_terminal(prepared, width):
    """All columns are there, none is cut, and no line is longer than the terminal is wide."""
    rows = report_rows(load_stage(prepared / "shards"))
    rows[0]["source"] = "RedPajamaStackExchangeAndALongNameBesides"
    rows = [row | {"documents": 10**9, "contaminated_documents": 7, "tokens": 627 * 10**9} for row in rows]
    tables = report_tables(rows, width)
    console = Console(file=(text := io.StringIO()), width=width)
    for table in tables:
        console.print(table)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text.getvalue(), "nothing is cut off in silence"
    titles = [str(column.header).replace("\n", " ") for table in tables for column in table.columns]
    assert [title for title in titles if title != "source"] == [
        *("documents", "MB", "too short % docs", "duplicate % docs", "duplicate % bytes", "kept docs", "kept MB"),
        *("in eval sets", "train docs", "valid. docs", "test docs", "tokens", "tokens %"),
    ]
    assert titles.count("source") == len(tables) == {80: 3, 120: 2, 200: 1}[width]
    for row in rows[1:]:
        assert sum(line.split()[0] == row["source"] for line in lines if line.strip()) == len(tables)


def test_the_report_adds_up(prepared):
    rows = json.loads((prepared / "report.json").read_text())
    manifest = TokenShards(prepared / "shards").manifest
    assert rows[-1]["tokens"] == sum(content["tokens"] for content in manifest["splits"].values())
    for row in rows:
        for unit in ("documents", "bytes"):
            assert row[unit] == row[f"short_{unit}"] + row[f"duplicate_{unit}"] + row[f"kept_{unit}"]
            assert rows[-1][f"kept_{unit}"] == sum(one[f"kept_{unit}"] for one in rows[:-1])
        assert row["share_of_tokens"] == row["tokens"] / rows[-1]["tokens"]
    lines = (prepared / "report.txt").read_text().splitlines()
    for row in rows:
        duplicates = row["duplicate_documents"]
        (shown, *_) = (line.split() for line in lines if line.split()[:1] == [row["source"]])
        assert shown[1] == str(row["documents"])
        assert shown[3] == f"{100 * row['short_documents'] / row['documents']:.2f}"
        # The duplicates are a share of what is not too short.
        assert shown[4] == f"{100 * duplicates / (row['documents'] - row['short_documents']):.2f}"
        assert shown[6] == str(row["kept_documents"])
        assert any(line.split()[-1:] == [f"{100 * row['share_of_tokens']:.1f}"] for line in lines)


def test_the_report_calls_a_source_as_a_recipe_does(tmp_path):
    rows = [{"text": f"{i} text " * 50, "source": "RedPajamaGithub"} for i in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DataRecipe(mix=Mix(weights={"RedPajamaGithub": 2}))
    run_prepare([tmp_path / "in.jsonl"], tmp_path / "out", recipe, Execution(workers=1))
    assert "\nRedPajamaGithub " in (tmp_path / "out/report.txt").read_text()
