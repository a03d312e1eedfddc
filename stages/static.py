"""static: the ResNet finetuned under a static rule: `python -m stages.static RULE KEPT`.

What BlockDrop's finetuning would give without looking at the image: finetune's epochs, batches,
optimiser and loss of the ResNet, and no reward. Does not depend on gamma. Where checkpoints.static names
a folder that has it, it is taken from there.
"""

import argparse
from dataclasses import replace
from functools import partial

from pipeline.config import Params
from pipeline.device import choose_device
from pipeline.infra.errors import UserError
from pipeline.infra.processes import is_main
from pipeline.models import checkpoint
from pipeline.models.resnet import ResNet
from pipeline.static_policies import static_rule
from pipeline.training.classification import Classification
from pipeline.training.loop import Metrics
from stages.support import common, training


def main(params: Params, *, rule: str, kept: int) -> None:
    """Write models/static/RULE-KEPT.

    Raises:
        UserError: params.yaml does not name the rule or the number of blocks.
    """
    if rule not in params.static.rules or kept not in params.static.num_kept:
        raise UserError(f"static in params.yaml does not name {rule} with {kept} kept; add it there")
    pretrained = checkpoint.load(common.PRETRAINED)
    item = f"{rule}-{kept}"

    def save(resnet: ResNet, metrics: Metrics) -> None:
        made = replace(pretrained, stage="static", resnet=resnet, metrics=metrics)
        checkpoint.save(made, common.STATIC / item)

    folder = training.imported(params.checkpoints.static)
    if folder is not None:
        found = training.import_resnet(
            folder / item, params, pretrained.classes, depth=params.resnet.depth
        )
        if is_main():
            save(found, {})
            training.record_import("static", params, folder / item, item=item)
        return
    resnet = pretrained.need_resnet().to(choose_device())
    section = params.finetune
    learner = Classification(
        resnet,
        optimizer=training.resnet_optimizer_of(resnet, section),
        normalisation=pretrained.normalisation,
        precision=section.precision,
        rule=static_rule(rule, kept, resnet.stages),
        distillation=training.distillation_of(resnet, params),
    )
    inputs = [common.PREPARED, common.PRETRAINED]
    training.train("static", learner, params, section, inputs, partial(save, resnet), item=item)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rule")
    parser.add_argument("kept", type=int)
    arguments = parser.parse_args()
    common.run(partial(main, rule=arguments.rule, kept=arguments.kept), trains=True)
