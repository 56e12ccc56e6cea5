"""The model that a run starts with: random weights, a Hugging Face checkpoint, or a checkpoint with adapters."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from btlm.checkpoint.to_transformers import check_weights, load_weights
from btlm.model import BTLMLMHeadModel

from .recipe import Lora, Recipe

if TYPE_CHECKING:
    from peft import PeftModel


class Trainee(NamedTuple):
    """A model to train, in fp32.

    Args:
        network: The network, including adapters in its layers if there are any.
        saved: The object to save with ``save_pretrained``: the network, or its adapters.
    """

    network: BTLMLMHeadModel
    saved: "BTLMLMHeadModel | PeftModel"

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return self.saved is not self.network

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for the optimizer: the muP groups, or one group of all adapters with the learning rate ``lr``."""
        if not self.adapted:
            return self.network.get_mup_param_groups(lr, weight_decay)
        params = list(self.trained().values())
        return [{"name": "adapters", "params": params, "lr": lr, "weight_decay": weight_decay}]


def prepare_model(recipe: Recipe) -> Trainee:
    """Build the model of a recipe on the CPU; the same weights in every process.

    Raises:
        ValueError: ``start.model`` cannot be read, or ``lora`` names layers that the model does not have.
    """
    torch.manual_seed(recipe.seed)
    config = recipe.config
    if recipe.start is None:
        network = BTLMLMHeadModel(config)
    else:
        try:
            check_weights(recipe.started_from, config)
            network = load_weights(recipe.started_from, config, torch.float32)
        except ValueError as error:
            raise ValueError(f"start.model is {recipe.start.model!r}, which cannot be used: {error}") from error
    saved = network if recipe.lora is None else _with_adapters(network, recipe.lora)
    if recipe.precision.activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.precision.compile:
        for block in network.transformer.h:
            block.compile(dynamic=False)
    network.train()
    return Trainee(network, saved)


def _with_adapters(network: BTLMLMHeadModel, lora: Lora) -> "PeftModel":
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as int, but any factor is valid
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=True,  # Conv1D is [in, out]
        task_type="CAUSAL_LM",
    )
    try:
        adapted: PeftModel = get_peft_model(network, config)
    except ValueError as error:
        raise ValueError(
            f"lora.target_modules are {list(lora.target_modules)}: {str(error).splitlines()[0]}"
        ) from error
    return adapted
