"""Asks vLLM about checkpoints, in a process of its own: ``python ask_vllm.py QUESTIONS.json ANSWERS.json``.

A question has a ``folder``, a ``dtype``, ``devices`` of tensor parallelism and of ``pipeline`` parallelism, and
``prompts`` of token ids. With ``compile``, vLLM compiles the model; on CPUs its pipelines need that. The answer has for
each prompt the greedy continuation (``texts``) and the log-probability of each token of the prompt but the first
(``scores``); or the ``error``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

NEW = 12  # tokens of each continuation

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """The answer; a checkpoint that is refused is refused before any of it is loaded."""
    devices, stages = question.get("devices", 1), question.get("pipeline", 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if devices * stages == 1 else "1"
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(
            question["folder"],
            skip_tokenizer_init=True,
            dtype=question["dtype"],
            tensor_parallel_size=devices,
            pipeline_parallel_size=stages,
            max_model_len=question.get("max_model_len", 64),
            enforce_eager=not question.get("compile", False),
        )
    except ValueError as error:
        return {"error": str(error)}
    parameters = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=0, detokenize=False)
    prompts = question["prompts"]
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters)
    texts = [list(answer.outputs[0].token_ids) for answer in answers]
    scores = [
        [answer.prompt_logprobs[i][prompt[i]].logprob for i in range(1, len(prompt))]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    del llm
    cleanup_dist_env_and_memory()
    return {"texts": texts, "scores": scores}


if __name__ == "__main__":
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([ask(question) for question in questions]))
