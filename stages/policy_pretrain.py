"""policy_pretrain: train the policy network as a classifier, or import one.

The paper has no such stage. With `policy_net.paths` the policy network decides from its own class
probabilities, and may answer itself. Without them nothing is trained, and the checkpoint is empty.
"""

from dataclasses import replace
from pathlib import Path

from pipeline.config import Params
from pipeline.data.metadata import load_classes
from pipeline.device import choose_device, seed_everything
from pipeline.models.build import make_resnet
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.resnet import ResNet
from pipeline.training.classification import Classification
from stages.support import common, compatibility, recipes, training

STAGE = "policy_pretrain"


def main(params: Params) -> None:
    """Write models/policy_pretrain: the policy network's ResNet, with class logits."""
    classes, section = load_classes(common.PREPARED), params.policy_net

    def make() -> ResNet:
        return make_resnet(
            family=section.family, depth=section.depth, width=section.width, num_classes=len(classes)
        )

    def load(path: Path) -> Checkpoint:
        resnet = compatibility.load_resnet(path, params, classes, depth=section.depth, section=section)
        return recipes.full_network(STAGE, resnet, params)

    def build() -> tuple[Classification, Checkpoint]:
        seed_everything(params.seed, STAGE)
        resnet = make().to(choose_device())
        learner = recipes.pretraining_of(resnet, params.policy_pretrain, params)
        return learner, recipes.full_network(STAGE, resnet, params)

    recipe = params.policy_pretrain
    if recipe.epochs or training.imported_path(params.checkpoints.policy_pretrain):
        training.run(STAGE, params, recipe, load=load, build=build)
    else:
        nothing = replace(recipes.full_network(STAGE, make(), params), resnet=None)
        training.write_nothing(STAGE, params, nothing, "0 epochs, the policy network starts untrained")


if __name__ == "__main__":
    common.run(main, trains=True)
