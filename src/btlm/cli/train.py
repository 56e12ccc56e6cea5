"""`btlm train`."""

from btlm.plan.options import Hardware

from .options import Device, Parser, options_of


def run(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(
        "btlm train RECIPE --data FOLDER --output FOLDER [options]",
        "Train a model by a recipe. The same command continues an interrupted run.",
        """  btlm train btlm-tiny --data shards --output runs/tiny
  btlm train btlm-3b --plan
  btlm train continue --set start.model=runs/tiny/model \\
      --data shards --output runs/more
  torchrun --nproc-per-node 8 -m btlm train btlm-3b \\
      --data shards --output runs/3b""",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or one that comes with btlm, as btlm-tiny")
    parser.add_argument("--data", metavar="FOLDER", help="token shards, see btlm data prepare")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the model, checkpoints, metrics and loss curve")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="value to change in the recipe, as in optimizer.lr=1.0e-3; may be repeated",
    )
    parser.add_options(Device)
    plan = parser.add_options(Hardware, "plan")
    plan.add_argument("--plan", action="store_true", help="print cost and memory of the run, and do nothing else")
    arguments = parser.parse(argv)
    device, hardware = options_of(Device, arguments).device, options_of(Hardware, arguments)
    changes = dict(map(_setting, arguments.set))
    if arguments.plan:
        from btlm.plan.plan import run_plan

        run_plan(arguments.recipe, hardware, changes, device)
        return
    if missing := [f"--{name}" for name in ("data", "output") if getattr(arguments, name) is None]:
        raise ValueError(
            f"train needs {' and '.join(missing)}: the token shards and a folder for the run; or --plan, which needs "
            "neither."
        )
    from btlm.train.command import run_training

    run_training(arguments.recipe, arguments.data, arguments.output, device, changes)


def _setting(text: str) -> tuple[str, object]:
    """Key and value of ``--set``; the value is YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} is not of the form KEY=VALUE, as in optimizer.lr=1.0e-3.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text!r}: the value is not YAML ({' '.join(str(error).split())}).") from error
