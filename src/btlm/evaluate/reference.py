"""Published scores, to be shown beside those of a model.

They were measured zero-shot with lm-evaluation-harness 0.3 by Stability AI (``Stability-AI/StableLM``, folder
``evals``); other versions of the harness have other prompts for some tasks.
"""

SOURCE = "Stability-AI/StableLM, evals: lm-evaluation-harness 0.3, zero-shot; MMLU, HumanEval: other public runs"

_COLUMNS = """
arc_challenge acc, arc_challenge acc_norm, arc_easy acc, arc_easy acc_norm, boolq acc, hellaswag acc,
hellaswag acc_norm, lambada_openai acc, lambada_openai perplexity, openbookqa acc, openbookqa acc_norm, piqa acc,
piqa acc_norm, sciq acc, sciq acc_norm, social_iqa acc, social_iqa acc_norm, truthfulqa_mc2 acc, winogrande acc
"""
# In percent, perplexity excepted; "-" is not published.
_ROWS = """
BTLM-3B-8k           34.9 37.6 70.5 67.1 69.6 51.8 69.8 66.2 4.72 27.6 40.8 75.8 77.2 92.9 89.5 42.8 46.1 36.0 65.0
StableLM-alpha-3B-v2 32.4 35.1 67.3 63.3 64.6 51.1 68.6 70.3 4.00 26.4 38.6 76.0 78.0 92.1 86.8 42.5 46.0 35.9 62.1
OpenLLaMA-3B-v2      33.9 36.1 67.6 63.5 65.7 52.2 70.0 66.7 4.57 26.0 37.6 76.7 77.9 92.4 87.8 41.2 45.2 34.6 62.9
Pythia-2.8B          30.1 32.9 63.5 59.1 64.1 45.4 59.4 65.1 5.00 23.8 34.8 74.1 74.0 88.2 83.2 40.9 44.3 35.6 58.2
StableLM-3B-4E1T     37.8 40.0 72.5 67.7 75.6 54.8 73.9 70.6 3.83 31.4 39.8 79.2 79.8 94.8 91.9 41.9 44.3 -    66.5
RedPajama-7B         37.7 39.4 72.3 69.2 70.8 52.6 70.3 71.3 3.92 29.0 40.6 77.1 77.4 92.7 89.7 42.6 44.9 33.0 64.3
MPT-7B               40.5 41.9 74.9 70.0 73.9 57.1 76.2 68.6 3.87 31.4 42.8 78.9 80.6 93.7 88.8 45.1 48.3 33.5 68.0
OpenLLaMA-7B-v2      38.8 42.4 71.9 69.7 71.4 55.7 74.6 71.0 3.83 30.2 40.2 79.2 80.3 93.8 90.1 42.0 46.0 34.6 65.8
LLaMA-7B             41.9 44.6 75.3 72.9 75.0 57.0 76.2 73.5 3.49 34.4 44.4 78.7 79.2 94.6 92.8 44.8 47.0 -    69.9
"""


def _read() -> dict[str, dict[tuple[str, str], float]]:
    models = {}
    for line in _ROWS.strip().splitlines():
        model, *values = line.split()
        keys = [(task, metric) for task, metric in (column.split() for column in _COLUMNS.split(","))]
        models[model] = {key: float(value) for key, value in zip(keys, values, strict=True) if value != "-"}
    # Other public runs of the model, which do not say how they asked.
    models["BTLM-3B-8k"] |= {("mmlu", "acc"): 28.01, ("humaneval", "pass@1"): 10.98}
    return models


# Scores in percent, perplexity excepted, by model and by the names of task and metric in lm-evaluation-harness.
REFERENCES = _read()
