"""pretrain: train the ResNet with every block, or import one."""

from pipeline.config import Params
from stages.support import common, training


def main(params: Params) -> None:
    training.run_full_network(
        "pretrain", params, params.resnet, params.pretrain, depth=params.resnet.depth
    )


if __name__ == "__main__":
    common.run(main, trains=True)
