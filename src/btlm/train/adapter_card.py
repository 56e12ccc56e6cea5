"""The README.md of a folder of adapters: what they adapt, how they were trained, and how they are used."""

import json

from btlm.settings import to_yaml

from .cost import num_adapter_parameters
from .recipe import Recipe

_CARD = """\
---
base_model: {quoted}
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
tags: [btlm, lora]
---

# Low-rank adapters for {base}

{trained:,} parameters in adapters (LoRA, arXiv 2106.09685) of rank {rank} on `{layers}`, for a model of
{total:,} parameters. They were trained by `btlm train` for {step:,} of {steps:,} steps, {tokens:,} tokens of text.

This folder has only the adapters (`adapter_model.safetensors`); the base model is needed, too. The commands of btlm
take the folder as a model, `btlm merge FOLDER MERGED` writes a model without adapters, and in Python:

```python
import btlm
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({quoted})
model = PeftModel.from_pretrained(base, "FOLDER").merge_and_unload()
```

## Recipe

```yaml
{recipe}```
"""


def adapter_card(recipe: Recipe, step: int, tokens: int) -> str:
    """The README of the adapters of a run.

    Args:
        recipe: Recipe of the run, with ``lora`` and ``start``.
        step: Number of the finished step.
        tokens: Number of tokens that were read.
    """
    assert recipe.lora is not None
    assert recipe.start is not None
    return _CARD.format(
        base=recipe.start.model,
        quoted=json.dumps(recipe.start.model),
        trained=num_adapter_parameters(recipe, recipe.config),
        rank=recipe.lora.rank,
        layers="`, `".join(recipe.lora.target_modules),
        total=recipe.config.num_parameters(),
        step=step,
        steps=recipe.total_steps,
        tokens=tokens,
        recipe=to_yaml(recipe),
    )
