"""Maximal update parametrization (arXiv 2203.03466): initialization, parameter groups and multipliers.

:mod:`.architecture_btlm` has the table.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import initialization as init

from .architecture_btlm import EMBEDDING, HIDDEN, MUP_TABLE, VECTOR
from .configuration_btlm import BTLMConfig

# Standard deviation of a unit normal truncated at two standard deviations.
_TRUNCATED_STD = 0.8796256610342398


def name_layers(model: nn.Module) -> None:
    """Store its row on each weight matrix, since Transformers initializes modules without their names."""
    for name, module in model.named_modules():
        layer = name.rpartition(".")[2]
        if layer in MUP_TABLE:
            module.mup_layer = layer


def init_weights(module: nn.Module, config: BTLMConfig) -> None:
    """Initialize a module that the table names, a LayerNorm, or a head that classifies.

    Normal truncated at two standard deviations, widened so that the weights have the standard deviation of the table.
    """
    layer = getattr(module, "mup_layer", None)
    if layer is not None and not (layer == "lm_head" and config.tie_word_embeddings):
        assert isinstance(module.weight, Tensor)
        std = config.architecture.init_std(MUP_TABLE[layer]) / _TRUNCATED_STD
        init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            init.zeros_(bias)
    elif isinstance(module, nn.Linear) and layer is None:  # a new head, which has muP's multiplier in its weights
        init.normal_(module.weight, std=config.initializer_range * config.mup_width_scale)
        if module.bias is not None:
            init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)


def mup_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: BTLMConfig,
    lr: float,
    weight_decay: float = 0.0,
    decoupled_wd: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of the table for a torch optimizer.

    Args:
        named_parameters: Parameters of a BTLM model by name; a tied tensor once.
        config: Configuration of the model.
        lr: Learning rate at base width.
        weight_decay: Decay of matrices and embeddings.
        decoupled_wd: Whether the optimizer multiplies decay only by the learning rate of the group
            (``torch.optim.AdamW``). If false, the decay of the matrices is divided by ``mup_width_scale`` so that their
            learning rate does not scale it.

    Returns:
        The groups ``matrices``, ``embeddings`` and ``biases_and_norms`` (key ``name``), each parameter in one of them.

    Raises:
        ValueError: ``lr`` or ``weight_decay`` is negative, or a tensor is not of the BTLM family.
    """
    if lr < 0 or weight_decay < 0:
        raise ValueError(f"lr ({lr}) and weight_decay ({weight_decay}) must not be negative.")
    rows = {row.group: row for row in (HIDDEN, EMBEDDING, VECTOR)}
    params: dict[str, list[nn.Parameter]] = {group: [] for group in rows}
    for name, parameter in named_parameters:
        layer, _, kind = name.rpartition(".")
        row = MUP_TABLE.get(layer.rpartition(".")[2])
        if row is not None and kind == "weight":
            params[row.group].append(parameter)
        elif parameter.ndim == 1:
            params[VECTOR.group].append(parameter)
        else:
            raise ValueError(f"{name} has no row in the muP table; give adapters and new layers their own group.")
    groups: list[dict[str, Any]] = []
    for group, row in rows.items():
        multiplier = config.architecture.lr_multiplier(row)
        decay = weight_decay / (1 if decoupled_wd else multiplier) if row.decays else 0.0
        groups.append({"name": group, "params": params[group], "lr": lr * multiplier, "weight_decay": decay})
    return groups


def scale_embeddings(inputs_embeds: Tensor, config: BTLMConfig) -> Tensor:
    """Token embeddings times the embedding multiplier; never in place, which would break hooks of adapters."""
    if config.mup_embeddings_scale == 1.0:
        return inputs_embeds
    return inputs_embeds * config.mup_embeddings_scale


def scale_logits(hidden_states: Tensor, config: BTLMConfig) -> Tensor:
    """Apply the output multiplier to the input of the head, which is linear, since its output is far larger."""
    return hidden_states if config.logits_scale == 1.0 else hidden_states * config.logits_scale
