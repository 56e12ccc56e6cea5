"""Exported GGUF files in llama.cpp against the model itself: tokens, logits on real text, greedy text.

    python benchmarks/llama_cpp_logits.py [MODEL] --text FILE ... [--llama-python PYTHON] [--types F16 Q8_0 Q4_0]

From each file or folder of documents (JSON lines, Parquet, text), the first document that is long enough is used. Needs
llama-cpp-python, here or in the environment of ``--llama-python``; the model itself is computed in fp32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tiny_inputs import add_smoke, write_documents, write_model

PROMPTS = (
    "She looked at him and",
    "The capital of",
    "Albert Einstein was known for",
    "The population of the country",
    "Let X be a scheme. Then",
    "fn main() {",
    "To install the package, run",
    "Once upon a time",
)


def main() -> None:
    """Export, compare and print Markdown tables."""
    from btlm.checkpoint import BUNDLED_MODEL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(BUNDLED_MODEL))
    parser.add_argument("--text", nargs="+", metavar="FILE", help="documents")
    parser.add_argument("--tokens", type=int, default=512, help="of each document")
    parser.add_argument("--new", type=int, default=64, help="tokens of each greedy text; 0 leaves them out")
    parser.add_argument("--types", nargs="+", default=["F16", "Q8_0", "Q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--flash-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use flash attention, as llama.cpp does by default on a CPU",
    )
    parser.add_argument("--cache", choices=("F16", "F32"), default="F16", help="type of llama.cpp's keys and values")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.new, args.types = 16, 2, ["F16"]
        with tempfile.TemporaryDirectory() as folder:
            args.model, args.text = str(write_model(Path(folder))), [str(write_documents(Path(folder)))]
            compare(args)
        return
    if not args.text:
        print("Nothing is measured without documents: give --text.")
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Print the tables; without llama.cpp, say so, and in a smoke run still compute and export ours."""
    found = not subprocess.run([args.llama_python, "-c", "import llama_cpp"], capture_output=True).returncode
    if not found:
        print("Nothing is measured without llama.cpp: give --llama-python, with pip install llama-cpp-python there.")
        if not args.smoke:
            return
    with tempfile.TemporaryDirectory() as work:
        texts = ours(args, Path(work))
        if not found:
            for kind in args.types:
                print(f"{kind}: {export(args, Path(work), kind).stat().st_size / 1e6:,.1f} MB")
            return
        rows = [(kind, *theirs(args, Path(work), kind)) for kind in args.types]
    attention = f"flash attention {'on' if args.flash_attention else 'off'}, {args.cache} cache"
    version = rows[0][2]["version"]
    print(f"\n{args.model}: {len(texts)} texts of {args.tokens:,} tokens; llama-cpp-python {version}, {attention}")
    same = sum(row["same_tokens"] for row in rows[0][2]["texts"])
    print(f"\nllama.cpp gives our tokens for {same} of {len(texts)} texts.\n")
    print(
        "| type | MB | logits: largest difference | mean | KL, nats per token | same first token | "
        "loss, nats per token |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, size, result in rows:
        of = {key: np.array([row[key] for row in result["texts"]]) for key in result["texts"][0]}
        distance = f"{of['largest'].max():.2g} | {of['mean'].mean():.2g} | {of['kl'].mean():.1e}"
        loss = f"{of['loss'].mean():.4f} (ours {of['our_loss'].mean():.4f})"
        print(f"| {kind} | {size / 1e6:,.1f} | {distance} | {of['same_first'].mean():.2%} | {loss} |")
    if not args.new:
        return
    print(f"\n| type | same greedy text of {args.new} tokens | the others: token that differs, margin of our choice |")
    print("|---|---|---|")
    for kind, _, result in rows:
        differ = [f"{number} ({margin:.1e})" for number, margin in filter(None, result["greedy"])]
        num = len(result["greedy"])
        print(f"| {kind} | {num - len(differ)} of {num} | {', '.join(differ) or '-'} |")


def ours(args: argparse.Namespace, work: Path) -> list[str]:
    """Tokens, fp32 logits and greedy texts of the model, written to ``work``."""
    import torch

    from btlm.checkpoint import load_model

    torch.set_num_threads(args.threads)
    loaded, tokenizer = load_model(args.model, dtype="float32", device="cpu")
    model: Any = loaded
    texts: list[dict[str, Any]] = []
    for text in args.text:
        tokens, start = first_document(text, tokenizer, args.tokens)
        texts.append({"text": start, "tokens": tokens})
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[: args.tokens]])).logits[0]
        np.save(work / f"{len(texts) - 1}.npy", logits.numpy())
    greedy = []
    for prompt in PROMPTS if args.new else ():
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(tokens, max_new_tokens=args.new, do_sample=False, pad_token_id=0)[0].tolist()
        with torch.inference_mode():
            best = model(torch.tensor([written])).logits[0].topk(2).values
        margins = (best[:, 0] - best[:, 1])[tokens.shape[1] - 1 : -1].tolist()
        greedy.append({"prompt": prompt, "tokens": written[tokens.shape[1] :], "margins": margins})
    options = {"threads": args.threads, "flash_attention": args.flash_attention, "cache": args.cache}
    asked = {"texts": texts, "greedy": greedy, "tokens": args.tokens, **options}
    (work / "asked.json").write_text(json.dumps(asked))
    return [text["text"] for text in texts]


def first_document(path: str, tokenizer: Any, num_tokens: int) -> tuple[list[int], str]:
    """Tokens and text of the start of the first document that has at least ``num_tokens`` tokens."""
    from btlm.data.documents import list_units, read_unit
    from btlm.data.recipe import Read

    for unit in list_units([path], Read())[0]:
        for document in read_unit(unit, Read()):
            text = getattr(document, "text", "")[: 8 * num_tokens]
            tokens = tokenizer(text).input_ids
            if len(tokens) >= num_tokens:
                return tokens, text
    raise SystemExit(f"{path} has no document of {num_tokens:,} tokens; give fewer --tokens or other --text.")


def theirs(args: argparse.Namespace, work: Path, kind: str) -> tuple[int, dict[str, Any]]:
    """Size in bytes of the file of a type, and llama.cpp's results with it."""
    file = export(args, work, kind)
    size = file.stat().st_size
    command = [args.llama_python, __file__, "--worker", str(work)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    file.unlink()
    return size, json.loads(result.splitlines()[-1])


def export(args: argparse.Namespace, work: Path, kind: str) -> Path:
    """Write the file of a type."""
    from btlm.convert.gguf import export_gguf

    file = work / "model.gguf"
    export_gguf(args.model, file, type=kind)
    return file


# Run in the environment of llama.cpp


def worker(work: Path) -> dict[str, Any]:
    """Compare ``model.gguf`` with the model's results in ``work``."""
    import llama_cpp

    asked = json.loads((work / "asked.json").read_text())
    context = max(asked["tokens"], 512)
    cache = {"F16": llama_cpp.GGML_TYPE_F16, "F32": llama_cpp.GGML_TYPE_F32}[asked["cache"]]
    llama = llama_cpp.Llama(
        str(work / "model.gguf"),
        n_ctx=context,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        flash_attn=asked["flash_attention"],
        type_k=cache,
        type_v=cache,
        logits_all=True,
        verbose=False,
    )
    texts: list[dict[str, Any]] = []
    for i, text in enumerate(asked["texts"]):
        tokens = text["tokens"][: asked["tokens"]]
        llama.reset()
        llama.eval(tokens)
        expected, logits = np.load(work / f"{i}.npy"), llama.scores[: len(tokens)]
        differences, ours, theirs = np.abs(expected - logits), log_softmax(expected), log_softmax(logits)
        followed = np.arange(len(tokens) - 1), tokens[1:]
        texts.append(
            {
                "same_tokens": llama.tokenize(text["text"].encode(), special=True) == text["tokens"],
                "largest": float(differences.max()),
                "mean": float(differences.mean()),
                "kl": float((np.exp(ours) * (ours - theirs)).sum(-1).mean()),
                "same_first": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
                "loss": -float(theirs[followed].mean()),
                "our_loss": -float(ours[followed].mean()),
            }
        )
    greedy = [first_difference(llama, **text) for text in asked["greedy"]]
    return {"version": llama_cpp.__version__, "texts": texts, "greedy": greedy}


def first_difference(llama: Any, prompt: str, tokens: list[int], margins: list[float]) -> tuple[int, float] | None:
    """The first new token that llama.cpp would not choose: its number, and the margin by which it is our best."""
    llama.reset()
    llama.eval(llama.tokenize(prompt.encode(), special=True))
    for i, (token, margin) in enumerate(zip(tokens, margins, strict=True)):
        if int(llama.scores[llama.n_tokens - 1].argmax()) != token:
            return i + 1, margin
        llama.eval([token])
    return None


def log_softmax(logits: Any) -> Any:
    """Log-softmax in fp64 over the last dimension."""
    shifted = np.asarray(logits, np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(Path(sys.argv[2]))))
    else:
        main()
