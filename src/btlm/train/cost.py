"""Floating-point operations of a training run. Its plan, its progress and its MFU all count them here.

Recomputation by activation checkpointing is not counted, as in the definition of MFU (model FLOPs utilization; PaLM,
arXiv 2204.02311, appendix B).
"""

from btlm.model import BTLMConfig

from .recipe import Recipe


def flops_per_token(recipe: Recipe, config: BTLMConfig, sequence_length: int) -> float:
    """Operations per token of training: see :meth:`btlm.BTLMConfig.flops_per_token`.

    Args:
        recipe: The run.
        config: Configuration of its model.
        sequence_length: Length of a row in tokens.
    """
    adapters = None if recipe.lora is None else num_adapter_parameters(recipe, config)
    return config.flops_per_token(sequence_length, training=True, adapters=adapters)


def flops_by_stage(recipe: Recipe, config: BTLMConfig) -> list[float]:
    """Operations of each stage of a run, whole steps only."""
    return [
        flops_per_token(recipe, config, stage.sequence_length) * (stage.steps * stage.batch_tokens)
        for stage in recipe.stages
    ]


def num_adapter_parameters(recipe: Recipe, config: BTLMConfig) -> int:
    """Parameters of the adapters, which are the only ones that are trained; 0 without LoRA."""
    if recipe.lora is None:
        return 0
    return config.architecture.num_adapter_parameters(recipe.lora.rank, recipe.lora.target_modules)
