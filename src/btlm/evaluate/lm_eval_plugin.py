"""The model ``btlm`` for lm-evaluation-harness' own command.

The harness 0.4.13 looks for no plug-ins of other packages, so that this module has to be imported: it adds the model,
and, run as a program (``python -m btlm.evaluate.lm_eval_plugin``), it goes on as ``lm_eval``. The arguments of the
model are those of :class:`btlm.evaluate.harness_model.EngineLM`.
"""

from lm_eval.api.registry import model_registry

model_registry.register("btlm", target="btlm.evaluate.harness_model:EngineLM")

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
