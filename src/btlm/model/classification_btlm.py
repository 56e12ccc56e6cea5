"""BTLM with a head that classifies texts or tokens: Transformers' generic classes on this network."""

from transformers import AutoModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from .configuration_btlm import BTLMConfig
from .modeling_btlm import BTLMModel, BTLMPreTrainedModel


class BTLMClassifier(BTLMPreTrainedModel):
    """What the classes below share."""

    def __init__(self, config: BTLMConfig) -> None:
        # The generic classes make the network with AutoModel. The class of a configuration that was loaded from a
        # checkpoint with its code may have been imported twice, so it is known only here.
        AutoModel.register(type(config), BTLMModel, exist_ok=True)
        super().__init__(config)


class BTLMForSequenceClassification(GenericForSequenceClassification, BTLMClassifier):
    """One label per text, read from its last token that is not padding: batches need ``config.pad_token_id``."""

    base_model_prefix = BTLMPreTrainedModel.base_model_prefix


class BTLMForTokenClassification(GenericForTokenClassification, BTLMClassifier):
    """One label per token, which sees only the tokens before it."""

    base_model_prefix = BTLMPreTrainedModel.base_model_prefix
