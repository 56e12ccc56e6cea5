"""Options of measurements."""

from dataclasses import dataclass
from typing import Annotated, Literal

from btlm.engine.options import Threads
from btlm.errors import OptionError
from btlm.settings import NOT_EMPTY, Count, Range, Whole, check


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What `btlm bench` measures.

    Args:
        dtypes: Dtypes of models with random weights (default: 4bit); checkpoints are measured as they are stored.
        contexts: Lengths in tokens, the decoded ones included, which are the last.
        new_tokens: Tokens to decode; speed is that of the median step.
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        threads: Number of threads (default: one per core).
        output: Folder that receives results.json, figure-1.png and figure-2.png.
    """

    dtypes: Annotated[tuple[Literal["4bit", "8bit", "bfloat16", "float32"], ...], NOT_EMPTY] | None = None
    contexts: Annotated[tuple[Count, ...], NOT_EMPTY] = (512, 2048)
    new_tokens: Annotated[int, Range(3)] = 32
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    threads: Threads | None = None
    output: Annotated[str, "FOLDER"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How `btlm perplexity` reads texts.

    Args:
        compare: Copies of the model, such as quantized ones, which are compared with it in the same windows.
        context: Tokens that a model reads at a time, at most.
        stride: Tokens that are predicted at a time, at most (default: the context); fewer give each of them more
            context, and take more time.
        limit: Number of documents to measure, at most; the results are marked as partial if there are more.
        text_field: Field of JSON lines and Parquet that holds the text.
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        kernels: Kernels of the engine: native, torch, an instruction set, or auto.
        threads: Number of threads (default: one per core).
        output: File that receives the results, as JSON.
    """

    compare: Annotated[tuple[str, ...], "MODEL"] = ()
    context: Count = 2048
    stride: Count | None = None
    limit: Count | None = None
    text_field: str = "text"
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    kernels: Annotated[str, "KERNELS"] = "auto"
    threads: Threads | None = None
    output: Annotated[str, "FILE"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
        if self.stride is not None and self.stride > self.context:
            raise OptionError(
                "{stride} is {}, longer than the {} of {context}; give a shorter one.", self.stride, self.context
            )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """What `btlm eval` asks a model.

    Args:
        suite: Suites (table1, table2, long, other), and tasks, groups and tags of lm-evaluation-harness.
        data: Folder of local files TASK_SPLIT.jsonl, such as piqa_validation.jsonl; without it, data come from the
            Hugging Face Hub.
        include: Folder of further tasks, as YAML files of lm-evaluation-harness.
        run_code: Whether programs that the model writes may be run, as humaneval does: without a network, files
            read-only, within limits of time and memory (Linux).
        samples: Number of programs per problem of humaneval, for pass@10 and pass@100; more than one are drawn at
            temperature 0.8.
        shots: Number of examples before a question (default: that of the paper, or of the task).
        limit: Number of questions per task, at most; the results are marked as partial.
        reference: Models whose published scores are shown beside.
        shards: Folder of token shards, in whose training text the questions are looked for.
        context: Tokens that the model reads at a time, at most (default: n_positions of the model).
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        kernels: Kernels of the engine: native, torch, an instruction set, or auto.
        threads: Number of threads (default: one per core).
        output: File that receives the results, as JSON; answers are kept beside it, so that the same command goes on
            after a stop.
    """

    suite: Annotated[tuple[str, ...], NOT_EMPTY, "NAME"] = ("table1",)
    data: Annotated[str, "FOLDER"] | None = None
    include: Annotated[str, "FOLDER"] | None = None
    run_code: bool = False
    samples: Count = 1
    shots: Whole | None = None
    limit: Count | None = None
    reference: Annotated[tuple[str, ...], "MODEL"] = ("BTLM-3B-8k",)
    shards: Annotated[str, "FOLDER"] | None = None
    context: Count | None = None
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    kernels: Annotated[str, "KERNELS"] = "auto"
    threads: Threads | None = None
    output: Annotated[str, "FILE"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What `btlm eval-positions` measures.

    Args:
        length: Tokens of a window (default: four times the training length).
        scalings: Position interpolations: none, dynamic (the factor of the window's length, for all of its positions),
            and fixed factors.
        train_length: Tokens of the longest texts that the model was trained on (default: n_positions of the model).
        windows: Number of windows, at most; they are spread evenly over the texts.
        bin: Tokens of a bin (default: a sixteenth of the length).
        text_field: Field of JSON lines and Parquet that holds the text.
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        kernels: Kernels of the engine: native, torch, an instruction set, or auto.
        threads: Number of threads (default: one per core).
        plot: File that receives the plot, as PNG.
        output: File that receives the results, as JSON.
    """

    length: Count | None = None
    scalings: Annotated[tuple[str, ...], NOT_EMPTY, "SCALING"] = ("none", "2", "dynamic")
    train_length: Count | None = None
    windows: Count = 8
    bin: Count | None = None
    text_field: str = "text"
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    kernels: Annotated[str, "KERNELS"] = "auto"
    threads: Threads | None = None
    plot: Annotated[str, "FILE"] | None = None
    output: Annotated[str, "FILE"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """What `btlm eval-needle` asks.

    Args:
        lengths: Tokens of a question (default: an eighth, a quarter, a half and all of n_positions).
        depths: Places of the fact in percent, from 0, the beginning, to 100.
        trials: Number of questions per length and depth.
        answers: Number of answers to choose from; chance is one of them.
        text: Files and folders with the text in which facts are hidden (default: the sentences of passkey retrieval).
        seed: Seed of the questions.
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        kernels: Kernels of the engine: native, torch, an instruction set, or auto.
        threads: Number of threads (default: one per core).
        plot: File that receives the heat map, as PNG.
        output: File that receives the results, as JSON.
    """

    lengths: Annotated[tuple[Count, ...], NOT_EMPTY] | None = None
    depths: Annotated[tuple[Annotated[int, Range(0, 100)], ...], NOT_EMPTY] = (0, 25, 50, 75, 100)
    trials: Count = 20
    answers: Annotated[int, Range(2, 1000)] = 10
    text: Annotated[tuple[str, ...], "TEXT"] = ()
    seed: Whole = 0
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    kernels: Annotated[str, "KERNELS"] = "auto"
    threads: Threads | None = None
    plot: Annotated[str, "FILE"] | None = None
    output: Annotated[str, "FILE"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
