"""static: the ResNet finetuned under a static rule: `python -m stages.static RULE NUM_KEPT`.

It shows what finetuning gives without a look at the image: finetune's epochs, batches, optimiser and
loss of the ResNet, and no reward, so it does not depend on gamma. Where checkpoints.static names a
folder that has it, it is taken from there.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.config import Params
from pipeline.device import choose_device
from pipeline.infra.errors import UserError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import Checkpoint
from pipeline.static_policies import static_rule
from pipeline.training.classification import Classification
from stages.support import common, compatibility, recipes, training


def main(params: Params, *, rule: str, num_kept: int) -> None:
    """Write models/static/RULE-NUM_KEPT.

    Raises:
        UserError: params.yaml does not name the rule or the number of blocks.
    """
    if rule not in params.static.rules or num_kept not in params.static.num_kept:
        raise UserError(f"static in params.yaml does not name {rule} with {num_kept} kept; add it there")
    before = replace(checkpoint.load(common.PRUNED), stage="static")

    def load(path: Path) -> Checkpoint:
        resnet = compatibility.load_resnet(
            path, params, before.classes, depth=params.resnet.depth, pruned=True
        )
        compatibility.require_same_channels(path, resnet, before.need_resnet())
        return replace(before, resnet=resnet)

    def build() -> tuple[Classification, Checkpoint]:
        resnet = before.need_resnet().to(choose_device())
        learner = Classification(
            resnet,
            optimizer=recipes.resnet_optimizer_of(resnet, params.finetune),
            normalisation=before.normalisation,
            precision=params.finetune.precision,
            rule=static_rule(rule, num_kept, resnet.stages),
            distillation=recipes.distillation_of(resnet, params.finetune, params),
        )
        return learner, before

    training.run("static", params, params.finetune, load=load, build=build, item=f"{rule}-{num_kept}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rule")
    parser.add_argument("num_kept", type=int)
    arguments = parser.parse_args()
    common.run(partial(main, rule=arguments.rule, num_kept=arguments.num_kept), trains=True)
