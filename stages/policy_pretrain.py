"""policy_pretrain: train the policy network as a classifier, or import one.

The paper has no such stage. With `policy_net.paths` the policy network decides from its own class
probabilities, and may answer itself. Without them nothing is trained, and the checkpoint is empty.
"""

from pipeline.config import Params
from stages.support import common, training

STAGE = "policy_pretrain"


def main(params: Params) -> None:
    """Write models/policy_pretrain: the policy network's ResNet, with class logits."""
    network, section = params.policy_net, params.policy_pretrain
    if section.epochs or training.imported_path(params.checkpoints.policy_pretrain):
        training.run_full_network(STAGE, params, network, section, depth=network.depth)
    else:
        training.write_nothing(STAGE, params, "0 epochs, the policy network starts untrained")


if __name__ == "__main__":
    common.run(main, trains=True)
