"""Damaged and crafted checkpoints: the same command on thousands of changed files.

Every command either works, or ends with exit status 2 and one line. As a program it prints the seeds for which it
does not:

    python -m tests.checkpoint.fuzz FIRST COUNT
"""

import contextlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from btlm.cli import main
from btlm.convert.quantize import quantize
from tests.checkpoint.tiny import pickle_tensors, save_tiny, tiny_model

SECONDS = 60  # in which a command ends; it takes less than one
NUMBERS = [0, 1, -1, 2, 3, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)]
VALUES = [*NUMBERS, None, True, False, "", "x", "F32", "U8", "\0", 0.5, 1e308, -1e-300, float("nan"), float("inf")]
OTHERS = [[], {}, [[]], [0], [0, 0], [1, 2, 3], {"a": 1}, [1e9, 1e9], "a" * 100_000, [[[[[[]]]]]]]


# Checkpoints


def make_forms(folder: Path) -> dict[str, Path]:
    """A valid checkpoint in every form that is read, by name."""
    forms = {"plain": save_tiny(folder / "plain", n_embd=64)}

    def copy(name: str) -> Path:
        forms[name] = Path(shutil.copytree(forms["plain"], folder / name))
        return forms[name]

    for bits in (4, 8):
        forms[f"{bits}bit"] = folder / f"{bits}bit"
        quantize(forms["plain"], forms[f"{bits}bit"], bits=bits, group_size=64)
    (copy("shards") / "model.safetensors").unlink()
    tiny_model(n_embd=64).save_pretrained(forms["shards"], max_shard_size="100KB")
    pickle_tensors(copy("pickle"))
    pickle_tensors(copy("older pickle"), _use_new_zipfile_serialization=False)
    shard = pickle_tensors(copy("pickle shards")).rename(forms["pickle shards"] / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tiny_model(n_embd=64).state_dict(), shard.name)}
    (forms["pickle shards"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return forms


# Changes


def change_bytes(content: bytes, random: random.Random) -> bytes:
    """Change a few bytes, most of them near the beginning or the end, where the headers are."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        if not data:
            break
        near = min(len(data), random.choice([16, 200, 4000, len(data)]))
        at = random.randrange(near) if random.random() < 0.7 else len(data) - 1 - random.randrange(near)
        kind = random.randrange(6)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at] = random.choice([0, 1, 127, 128, 255, random.randrange(256)])
        elif kind == 2:
            del data[at : at + random.choice([1, 7, 1000])]
        elif kind == 3:
            data[at:at] = random.randbytes(random.choice([1, 8, 64]))
        elif kind == 4:
            data[at : at + 8] = struct.pack("<q", random.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
        else:
            data = data[:at]
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a value of JSON, with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_json(value: Any, random: random.Random) -> Any:
    """Replace, remove, repeat, rename or exchange a few values."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        found = list(places(value))
        if not found:
            return random.choice([*VALUES, *OTHERS])
        container, key = random.choice(found)
        other, other_key = random.choice(found)
        kind = random.randrange(6)
        if kind <= 2:
            container[key] = random.choice([*VALUES, *OTHERS])
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, dict):
            container[random.choice(["x", "", str(other_key), "__metadata__"])] = container.pop(key)
        else:
            container[key] = json.loads(json.dumps(other[other_key]))
    return value


def change_header(content: bytes, random: random.Random) -> bytes:
    """Change the header of a file in safetensors, and keep the rest."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change_json(json.loads(content[8 : 8 + length]), random)).encode()
    if random.random() < 0.5:  # as before, the numbers begin where they did
        header = header.ljust(length)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def change_archive(content: bytes, random: random.Random) -> bytes:
    """Change members of a zip archive, with checksums that are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    if random.random() < 0.2:
        name = random.choice(list(members))
    members[name] = change_bytes(members[name], random)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return written.getvalue()


def change_file(path: Path, random: random.Random) -> None:
    """Change one file of a checkpoint."""
    content = path.read_bytes()
    change: Callable[[bytes, Any], bytes] = change_bytes
    if random.random() < 0.75:
        if path.suffix == ".json":
            path.write_text(json.dumps(change_json(json.loads(content), random)))
            return
        if path.suffix == ".safetensors":
            change = change_header
        elif zipfile.is_zipfile(path):
            change = change_archive
    path.write_bytes(change(content, random))


# Commands


def command(random: random.Random, model: Path, output: Path) -> list[str]:
    """A command that reads a model."""
    generate = ["generate", "--model", str(model), "--max-new-tokens", "3", "--threads", "1"]
    return random.choices(
        [
            [*generate, "--engine", "btlm", "ab"],
            [*generate, "--engine", "btlm", "--kernels", "torch", "ab"],
            [*generate[:-2], "--engine", "transformers", "ab"],
            ["quantize", str(model), str(output), "--group-size", "64"],
            ["info", str(model)],
        ],
        weights=[10, 2, 1, 3, 1],
    )[0]


def problem_of(seed: int, forms: dict[str, Path], folder: Path) -> str | None:
    """What is wrong with a command on the changed checkpoint of a seed; None if nothing is."""
    chance = random.Random(seed)
    form = chance.choice(list(forms))
    model = folder / "model"
    for left in folder.iterdir():
        shutil.rmtree(left)
    shutil.copytree(forms[form], model)
    files = sorted(model.iterdir())
    weights = [3 if file.suffix in (".safetensors", ".bin") or "index" in file.name else 1 for file in files]
    path = chance.choices(files, weights)[0]
    change_file(path, chance)
    argv = command(chance, model, folder / "output")
    status, error, told = run(argv)
    where = f"seed {seed}: {form}, {path.name}: {' '.join(argv[:1] + argv[-3:])}"
    if error:
        return f"{where}: {error}"
    errors = [line for line in told.splitlines() if line.startswith("btlm: error: ")]
    if (status, len(errors)) not in ((0, 0), (2, 1)):
        return f"{where}: status {status}: {told[-500:]}"
    if errors and len(errors[0]) > 2000:
        return f"{where}: a line of {len(errors[0]):,} characters"
    if status == 2 and (folder / "output").exists():
        return f"{where}: an output is left"
    return None


def run(argv: list[str]) -> tuple[int, str, str]:
    """Exit status, traceback or warning, and standard error of a command."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS} s")

    out, err, error, status = io.StringIO(), io.StringIO(), "", -1
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(argv)
    except BaseException as raised:  # a panic of a library in Rust is no Exception
        if isinstance(raised, KeyboardInterrupt):
            raise
        error = "".join(traceback.format_exception(raised)[-4:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return status, error, err.getvalue()


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        all_forms = make_forms(Path(place, "forms"))
        Path(place, "run").mkdir()
        problems = 0
        for number in range(first, first + count):
            if found := problem_of(number, all_forms, Path(place, "run")):
                problems += 1
                sys.stdout.write(f"{found}\n\n")
                sys.stdout.flush()
        sys.stdout.write(f"{count:,} files, {problems} problems\n")
