"""The engine against llama.cpp at BTLM-3B's shape, in turn (A B A B), on the same threads.

    pip install llama-cpp-python gguf   (compiles for minutes; use a separate environment)
    python benchmarks/engine.py --llama-python PYTHON [--only decode-512 prefill-512] [--repeats 3] [--output FILE]

llama.cpp has no BTLM, but its architecture `jais` has the same mathematics, so that random weights of BTLM's shape cost
there what BTLM would. All its matrices, including both tables, are in Q4_0; its feed-forward layers are 6,912 wide
instead of 6,826, which it could not quantize. It is called through its C interface, without the copies and buffers of
its Python class: batches of 512, cache in fp16 (it has no 8-bit cache for heads of 80), no flash attention, which
decodes a third slower here (`--flash`). Our model has 4-bit blocks in groups of 128, an 8-bit table, and the engine's
default int8 cache, or an int4 cache where the table says so; speculation is off. The tokens are random.

Each figure comes from a process of its own. Speed is measured after 32 tokens of warm-up; the speed of decoding is that
of the median step. Memory is VmHWM of the whole process, including mapped files; the peer's is measured with and
without mapping, and the smaller one counts. The limits are RLIMIT_AS: they limit the address space, including the whole
mapped file, which is stricter than a limit on resident memory. The time to the first token is measured with the file in
the page cache: from opening the model in a running process; and for the whole command `btlm generate`, against a Python
process that loads llama.cpp and its model and evaluates as many tokens. The read rate of the memory is measured before
every turn. `--output` keeps every turn and the next call adds to it, so that long sections can be run in pieces. Needs
Linux.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tiny_inputs import SIZES, add_smoke

LAYERS, WIDTH, HEADS, INNER, VOCABULARY = 32, 2560, 32, 6912, 50257
FIRST_PROMPT = "the" + 15 * " the"  # 16 tokens
TOGETHER = 8
NEW, FULL_NEW, TORCH_NEW = 64, 8, 3
READ_BYTES = 512 * 2**20
SMOKE = ("decode-512", "memory-2048", "limit-2.0-at-2048", "eight-512", "first-token-open", "first-token-start")
SMOKE_PROMPT, SMOKE_NEW, SMOKE_BYTES = 32, 3, 2**20


class Measure(NamedTuple):
    """A row of the table: a value per side of a run in units of ``scale``; if ``over``, divided by that of one text."""

    run: str
    value: str
    unit: str
    scale: float = 1.0
    ours: str = "ours"
    peer: str = "peer"
    over: bool = False


MEASURES = {
    "decode-512": Measure("512", "decode", "tokens/s"),
    "prefill-512": Measure("512", "prefill", "tokens/s"),
    "decode-7000": Measure("7000", "decode", "tokens/s"),
    "prefill-7000": Measure("7000", "prefill", "tokens/s"),
    "memory-2048": Measure("memory-2048", "peak", "GB", 1e9),
    "memory-8192": Measure("memory-8192", "peak", "GB", 1e9),
    "limit-2.0-at-2048": Measure("limit-2.0", "peak", "GB used", 1e9),
    "limit-3.0-at-8192": Measure("limit-3.0", "peak", "GB used", 1e9),
    "eight-512": Measure("together", "decode", "tokens/s", ours="ours-eight", peer="peer-eight"),
    "eight-over-one-512": Measure("together", "decode", "times", ours="ours-eight", peer="peer-eight", over=True),
    "first-token-open": Measure("first-token", "first", "s"),
    "first-token-start": Measure("first-token", "process", "s", ours="ours-process", peer="peer-process"),
    "one-thread-decode-512": Measure("one-thread", "decode", "tokens/s"),
    "one-thread-prefill-512": Measure("one-thread", "prefill", "tokens/s"),
    "avx2-decode-512": Measure("avx2", "decode", "tokens/s"),
    "avx2-prefill-512": Measure("avx2", "prefill", "tokens/s"),
    "int4-cache-decode-512": Measure("int4-512", "decode", "tokens/s"),
    "int4-cache-decode-7000": Measure("int4-7000", "decode", "tokens/s"),
    "int4-cache-eight-512": Measure("int4-together", "decode", "tokens/s", ours="ours-eight", peer="peer-eight"),
    "int4-cache-eight-over-one-512": Measure(
        "int4-together", "decode", "times", ours="ours-eight", peer="peer-eight", over=True
    ),
    "torch-decode-16": Measure("torch", "decode", "tokens/s"),
}


def sides(run: str, threads: int) -> dict[str, dict[str, Any]]:
    """The processes of one turn of a run, in their order, and the task of each."""
    if run.startswith("int4-"):
        of_run = sides(run.removeprefix("int4-"), threads)
        return {side: {**task, "cache": "int4"} for side, task in of_run.items()}
    task: dict[str, Any] = {"prompt": 512, "new": NEW, "threads": threads, "warm": True}
    both = {"ours": task, "peer": task}
    if run == "512":
        return both
    if run == "7000":
        return {side: {**task, "prompt": 7000} for side in both}
    if run.startswith("memory-"):
        task = {**task, "prompt": int(run.removeprefix("memory-")) - FULL_NEW, "new": FULL_NEW}
        return {"ours": task, "peer": {**task, "map": False}, "peer-mapped": {**task, "map": True}}
    if run.startswith("limit-"):
        gigabytes = float(run.removeprefix("limit-"))
        context = 2048 if gigabytes < 3 else 8192
        return {"ours": {**task, "prompt": context - FULL_NEW, "new": FULL_NEW, "limit": int(gigabytes * 1e9)}}
    if run == "together":
        eight = {**task, "texts": TOGETHER}
        return {"ours": task, "peer": task, "ours-eight": eight, "peer-eight": eight}
    if run == "first-token":
        first = {**task, "prompt": 16, "new": 1, "warm": False}
        return dict.fromkeys(("ours", "peer", "ours-process", "peer-process"), first)
    if run == "one-thread":
        return {side: {**task, "threads": 1} for side in both}
    if run == "avx2":
        return {**both, "ours": {**task, "kernels": "avx2"}}
    assert run == "torch", run
    return {"ours": {**task, "prompt": 16, "new": TORCH_NEW, "warm": False, "kernels": "torch"}}


# Run in separate processes


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement of the engine."""
    if "limit" in task:
        resource.setrlimit(resource.RLIMIT_AS, (task["limit"], task["limit"]))
    import numpy as np

    from btlm.engine import Engine, GenerationOptions

    prompt, new, texts = task["prompt"], task["new"], task.get("texts", 1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, prompt).tolist() for _ in range(texts)]
    options = GenerationOptions(max_new_tokens=new, lookup_tokens=0)
    begun = time.perf_counter()
    engine = Engine.open(
        task["model"],
        cache_dtype=task.get("cache", "auto"),
        context=prompt + new,
        num_requests=texts,
        kernels=task.get("kernels", "auto"),
        threads=task["threads"],
    )
    opened = time.perf_counter()
    if task["warm"]:
        list(engine.generate(rng.integers(0, VOCABULARY, 32).tolist(), GenerationOptions(max_new_tokens=2)))
    started = time.perf_counter()
    running = [engine.add(ids, options, stop_ids=frozenset()) for ids in prompts]
    ends: list[float] = []
    while any(text.new_tokens == 0 for text in running):
        engine.step()
    ends.append(time.perf_counter())
    while all(text.finished is None for text in running):
        engine.step()
        ends.append(time.perf_counter())
    return figures(begun, opened, started, ends, texts * prompt, texts)


def peer(task: dict[str, Any]) -> dict[str, Any]:
    """One measurement of llama.cpp."""
    import ctypes

    import numpy as np

    if not Path(task["gguf"]).exists():
        write_gguf(Path(task["gguf"]), task["layers"])
    import llama_cpp as c

    silent = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    prompt, new, texts = task["prompt"], task["new"], task.get("texts", 1)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCABULARY, (texts, prompt + new))
    begun = time.perf_counter()
    of_model = c.llama_model_default_params()
    of_model.load_mode = c.LLAMA_LOAD_MODE_MMAP if task.get("map", True) else c.LLAMA_LOAD_MODE_NONE
    model = c.llama_model_load_from_file(str(task["gguf"]).encode(), of_model)
    options = c.llama_context_default_params()
    options.n_ctx = texts * (-(-(prompt + new) // 256) * 256)
    options.n_seq_max = texts
    options.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[task["flash"]]
    options.n_threads = options.n_threads_batch = task["threads"]
    context = c.llama_init_from_model(model, options)
    if not model or not context:
        sys.exit("llama.cpp could not load the model")
    batch = c.llama_batch_init(512, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
        """Decode tokens, given with position, text, and whether logits are wanted."""
        for i, (token, position, text, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, text
            batch.logits[i] = wanted
        batch.n_tokens = len(tokens)
        if c.llama_decode(context, batch):
            sys.exit("llama.cpp could not decode")
        c.llama_synchronize(context)

    opened = time.perf_counter()
    if task["warm"]:
        decode([(int(rows[0, i]), i, 0, i == 31) for i in range(32)])
        c.llama_memory_clear(c.llama_get_memory(context), True)
    started = time.perf_counter()
    for text in range(texts):
        for start in range(0, prompt, 512):
            places = range(start, min(start + 512, prompt))
            decode([(int(rows[text, i]), i, text, i == prompt - 1) for i in places])
    ends = [time.perf_counter()]
    for i in range(prompt, prompt + new - 1):
        decode([(int(rows[text, i]), i, text, True) for text in range(texts)])
        ends.append(time.perf_counter())
    logits = np.ctypeslib.as_array(
        ctypes.cast(c.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float)), (VOCABULARY,)
    )
    if not np.isfinite(logits).all() or logits.std() == 0:
        sys.exit("llama.cpp's logits are not numbers")
    return figures(begun, opened, started, ends, texts * prompt, texts)


def write_gguf(path: Path, layers: int) -> None:
    """Random Q4_0 blocks in the architecture `jais`, in a file that gets its name when it is complete."""
    import gguf
    import numpy as np

    partial = path.with_name(f"{path.name}.partial")
    writer = gguf.GGUFWriter(str(partial), "jais", use_temp_file=False)
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{i}>".encode() for i in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 1)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), np.uint8)  # an fp16 scale, then 32 times 4 bits
        blocks[..., :2] = np.array([0.004], np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    def norm(name: str) -> None:
        vector(f"{name}.weight", WIDTH, 1)
        vector(f"{name}.bias", WIDTH, 0)

    matrix("token_embd", VOCABULARY, WIDTH)
    matrix("output", VOCABULARY, WIDTH)
    norm("output_norm")
    for i in range(layers):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        for name, rows, columns in (
            ("attn_qkv", 3 * WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            matrix(f"blk.{i}.{name}", rows, columns)
            vector(f"blk.{i}.{name}.bias", rows, 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def rate(task: dict[str, Any]) -> dict[str, Any]:
    """Read rate of the memory in bytes/s: the median of five passes."""
    import numpy as np

    from btlm.kernels import load_kernels

    kernels = load_kernels("auto", task["threads"])
    values, seconds = np.ones(task["bytes"], np.uint8), []
    for _ in range(5):
        start = time.perf_counter()
        kernels.sum_bytes(values)
        seconds.append(time.perf_counter() - start)
    return {"rate": values.nbytes / statistics.median(seconds), "kernels": kernels.name}


def figures(
    begun: float, opened: float, started: float, ends: list[float], tokens: int, texts: int
) -> dict[str, float]:
    """Result of a process, from the times when it began, had opened the model, got prompts of ``tokens`` tokens, and
    had the first and each further token of all texts."""
    steps = [after - before for before, after in pairwise(ends)]
    status = Path("/proc/self/status").read_text().splitlines()
    found = {
        "open": opened - begun,
        "first": ends[0] - begun,
        "prefill": tokens / (ends[0] - started),
        "peak": int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024,
    }
    return found | ({"decode": texts / statistics.median(steps)} if steps else {})


# Turns


def process(side: str, task: dict[str, Any], args: argparse.Namespace, model: Path, gguf: Path) -> dict[str, Any]:
    """Measurements of one side of a turn; an ``error`` if its memory was limited and it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"]), "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("OMP_WAIT_POLICY", None)  # "passive" would make the barriers of llama.cpp slow
    task = {**task, "model": str(model), "gguf": str(gguf), "layers": args.layers, "flash": args.flash}
    if args.smoke and "prompt" in task:
        task |= {"prompt": min(task["prompt"], SMOKE_PROMPT), "new": min(task["new"], SMOKE_NEW)}
    kind, _, how = side.partition("-")
    python = str(args.llama_python) if kind == "peer" else sys.executable
    command = [python, __file__, "--one", kind, json.dumps(task)]
    if side == "ours-process":
        words = ["--model", str(model), "--max-new-tokens", "1", "--threads", str(task["threads"]), FIRST_PROMPT]
        command = [sys.executable, "-m", "btlm", "generate", *words]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        problem = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        if "limit" in task:
            return {"error": problem}
        sys.exit(f"{side}, {task}:\n{done.stderr}")
    if how == "process":
        return {"process": seconds}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def turn(run: str, args: argparse.Namespace, model: Path, gguf: Path) -> dict[str, Any]:
    """One turn of a run: the read rate of the memory, then each side once."""
    found: dict[str, Any] = process("rate", {"threads": args.threads, "bytes": args.read_bytes}, args, model, gguf)
    for side, task in sides(run, args.threads).items():
        if side.startswith("peer") and args.llama_python is None:
            continue
        found[side] = process(side, task, args, model, gguf)
        print(f"  {run} {side}: {found[side]}", file=sys.stderr, flush=True)
    if "peer-mapped" in found:
        found["peer"] = min(found["peer"], found["peer-mapped"], key=lambda values: values["peak"])
    return found


def row(name: str, turns: list[dict[str, Any]]) -> str:
    """Table row with the medians of a measure and of its ratio over the turns."""
    measure = MEASURES[name]
    memory = statistics.median(found["rate"] for found in turns) / 1e9

    def values(side: str, one: str) -> list[float]:
        present = [found for found in turns if measure.value in found.get(side, {})]
        by = [found[one][measure.value] if measure.over else measure.scale for found in present]
        return [found[side][measure.value] / divisor for found, divisor in zip(present, by, strict=True)]

    mine, theirs = values(measure.ours, "ours"), values(measure.peer, "peer")
    if errors := [found[measure.ours]["error"] for found in turns if "error" in found[measure.ours]]:
        return f"| {name} | {measure.unit} | failed: {errors[-1]} | | | {memory:.1f} | {len(turns)} |"
    peer_cell = f"{statistics.median(theirs):.2f}" if theirs else ""
    ratio = f"{statistics.median(a / b for a, b in zip(mine, theirs, strict=True)):.2f}" if theirs else ""
    middle = f"{statistics.median(mine):.2f} | {peer_cell} | {ratio}"
    return f"| {name} | {measure.unit} | {middle} | {memory:.1f} | {len(turns)} |"


def missing(args: argparse.Namespace) -> str | None:
    """Reason why nothing can be measured, or ``None``."""
    from btlm.engine.memory import available_memory

    if importlib.util.find_spec("btlm.kernels._native") is None:
        return "the native kernels: btlm was installed without a C++ compiler"
    if args.llama_python is None:
        return None if args.smoke else "llama.cpp: --llama-python names a Python that has llama-cpp-python and gguf"
    code = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('llama_cpp', 'gguf', 'numpy'))))"
    try:
        found = subprocess.run([str(args.llama_python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        found = False
    if not found:
        return f"llama-cpp-python and gguf in {args.llama_python}"
    needed = 1e9 + 6.5e9 * args.layers / LAYERS  # the peer at 8,192 tokens
    available = available_memory()
    if available is not None and available < needed:
        return f"{needed / 1e9:.1f} GB of memory ({available / 1e9:.1f} GB are available)"
    return None


def prepare(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """The folder of our model, with a tokenizer, and the file of the peer's model; random unless they are given."""
    from btlm.checkpoint import BUNDLED_MODEL
    from btlm.evaluate.random_checkpoint import SHAPES, write_random_model

    model = folder / "model"
    model.mkdir()
    if args.model is None:
        sizes = SIZES if args.smoke else SHAPES["btlm-3b"]
        write_random_model(model, {**sizes, "n_layer": args.layers}, "4bit")
    else:
        for path in args.model.resolve().iterdir():
            (model / path.name).symlink_to(path)
    for path in BUNDLED_MODEL.glob("tokenizer*.json"):
        if not (model / path.name).exists():
            (model / path.name).symlink_to(path)
    return model, args.gguf or folder / "btlm-shape-q4_0.gguf"


def main() -> None:
    """Run the chosen measurements in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llama-python", type=Path, metavar="PYTHON", help="a Python that has llama-cpp-python and gguf"
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash", choices=("auto", "off", "on"), default="off", help="attention of llama.cpp")
    parser.add_argument("--layers", type=int, default=LAYERS, help="number of layers; fewer to try this file")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a 4-bit folder of BTLM-3B's shape, instead of a random one"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the peer's model; written if it is missing")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="keeps all turns as JSON; turns of earlier calls count, too"
    )
    add_smoke(parser)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "TASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({"ours": ours, "peer": peer, "rate": rate}[args.one[0]](json.loads(args.one[1]))))
        return
    args.read_bytes = READ_BYTES
    if args.smoke:
        args.only, args.repeats, args.layers, args.read_bytes = SMOKE, 1, 1, SMOKE_BYTES
        if args.llama_python is None:
            print("llama.cpp is left out: --llama-python names a Python that has llama-cpp-python and gguf.\n")
    if reason := missing(args):
        print(f"Nothing is measured without {reason}.")
        return
    files = {name: path and str(path.resolve()) for name, path in (("model", args.model), ("gguf", args.gguf))}
    settings = {"layers": args.layers, "threads": args.threads, "flash": args.flash, **files}
    kept: dict[str, Any] = {**settings, "turns": {}}
    if args.output is not None and args.output.exists():
        kept = json.loads(args.output.read_text())
        if settings != {name: kept.get(name) for name in settings}:
            sys.exit(f"{args.output} has turns of other settings; give another file.")
    with tempfile.TemporaryDirectory(prefix="btlm-engine-") as name:
        model, gguf = prepare(Path(name), args)
        # One run that is not counted: it writes the peer's file, and puts both files into the page cache.
        for side in ("ours", "peer") if args.llama_python else ("ours",):
            process(side, sides("first-token", args.threads)[side], args, model, gguf)
        for run in dict.fromkeys(MEASURES[measure].run for measure in args.only):
            for _ in range(args.repeats):
                kept["turns"].setdefault(run, []).append(turn(run, args, model, gguf))
                if args.output is not None:
                    partial = args.output.with_name(f"{args.output.name}.partial")
                    partial.write_text(json.dumps(kept, indent=1) + "\n")
                    partial.rename(args.output)
    print(f"{args.layers} layers, {args.threads} threads, medians; ratio: ours over the peer's, per turn\n")
    print("| measure | unit | ours | llama.cpp | ratio | memory GB/s | turns |\n|---|---|---|---|---|---|---|")
    for measure in args.only:
        print(row(measure, kept["turns"][MEASURES[measure].run]), flush=True)


if __name__ == "__main__":
    main()
