"""sole: a ResNet of another depth with every block, by pretrain's recipe: `python -m stages.sole DEPTH`.

It shows what a smaller network of the same cost can do. It is trained also when pretrain imports, unless
checkpoints.sole names a folder that has it.
"""

import argparse
from functools import partial

from pipeline.config import Params
from pipeline.infra.errors import UserError
from stages.support import common, training


def main(params: Params, *, depth: int) -> None:
    """Write models/sole/DEPTH.

    Raises:
        UserError: params.yaml does not name the depth.
    """
    if depth not in params.sole.depths:
        raise UserError(f"sole.depths {list(params.sole.depths)} does not name {depth}; add it there")
    training.run_full_network(
        "sole", params, params.resnet, params.pretrain, depth=depth, item=str(depth)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("depth", type=int)
    common.run(partial(main, depth=parser.parse_args().depth), trains=True)
