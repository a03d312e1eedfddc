"""static: the ResNet finetuned under a static rule: `python -m stages.static RULE KEPT`.

What BlockDrop's finetuning would give without looking at the image: finetune's epochs, batches and
optimiser and loss of the ResNet, and no reward. Does not depend on gamma.
"""

import argparse
from dataclasses import replace
from functools import partial

from pipeline import checkpoint
from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.runtime import choose_device
from pipeline.static_policies import static_rule
from pipeline.training import Classification, Metrics
from stages import common, trainer


def main(params: Params, *, rule: str, kept: int) -> None:
    """Write models/static/RULE-KEPT.

    Raises:
        UserError: params.yaml does not name the rule or the number of blocks.
    """
    if rule not in params.static.rules or kept not in params.static.kept:
        raise UserError(f"static in params.yaml does not name {rule} with {kept} kept; add it there")
    pretrained = checkpoint.load(common.PRETRAINED)
    resnet = pretrained.need_resnet().to(choose_device())
    item = f"{rule}-{kept}"

    def save(metrics: Metrics) -> None:
        made = replace(pretrained, stage="static", resnet=resnet, metrics=metrics)
        checkpoint.save(made, common.STATIC / item)

    section = params.finetune
    learner = Classification(
        resnet,
        optimizer=trainer.resnet_optimizer_of(resnet, section),
        normalisation=pretrained.normalisation,
        precision=section.precision,
        rule=static_rule(rule, kept, resnet.stages),
        distillation=trainer.distillation_of(resnet, params),
    )
    inputs = [common.PREPARED, common.PRETRAINED]
    trainer.train("static", learner, params, section, inputs, save, item=item)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rule")
    parser.add_argument("kept", type=int)
    arguments = parser.parse_args()
    common.run(partial(main, rule=arguments.rule, kept=arguments.kept), trains=True)
