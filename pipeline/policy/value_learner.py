"""Learning with decisions by value (`models/path_values.py`), with a frozen ResNet or a learning one.

Shapes: B images of a batch, R of them for which the ResNet runs, P paths, K blocks, N classes.
"""

import torch
from torch import Tensor, nn

from pipeline import distributed, flops
from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import autocast
from pipeline.models.policies import policy_statistics
from pipeline.models.policy_net import PolicyNet, average_down
from pipeline.models.resnet import ResNet
from pipeline.policy.objectives import PolicyObjective, Reward
from pipeline.policy.trained_resnet import TrainedResNet
from pipeline.policy.values import fit_values
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch, Metrics
from pipeline.training.optim import optimizer_step


class ValueLearner:
    """The ResNet learns on the paths that the values choose; each validation fits the values anew.

    Nothing is sampled to learn the values, since every path is run on every validation image. The policy
    network is a finished classifier, of which nothing else changes.

    Args:
        optimizer: of the ResNet.
        objective: its gamma, its block shares, and alpha: an image takes the best path with that
            probability, else one of the others.
        distillation: the ResNet's loss; None: the ResNet is frozen, and there is nothing to train.

    Raises:
        ValueError: the policy network has no values.
    """

    noise_columns = 2  # whether an image takes the best path, and which other one

    def __init__(
        self,
        resnet: ResNet,
        policy_net: PolicyNet,
        *,
        optimizer: torch.optim.Optimizer,
        objective: PolicyObjective,
        normalisation: Normalisation,
        image_size: int,
        precision: str,
        distillation: Distillation | None,
    ) -> None:
        if policy_net.path_values is None:
            raise ValueError("this policy network decides block by block; take a PolicyLearner")
        self.resnet = resnet
        self.policy_net = policy_net.eval()
        self.optimizer = optimizer
        self.objective = objective
        self.normalisation = normalisation
        self.precision = precision
        self.reward = Reward(objective, next(policy_net.parameters()).device)
        self.cost = flops.measure(resnet, policy_net, image_size)
        self.modules: dict[str, nn.Module] = {"policy_net": policy_net}
        self.trained: TrainedResNet | None = None
        if distillation is not None:
            self.modules["resnet"] = resnet
            self.trained = TrainedResNet(resnet, distillation=distillation, precision=precision)
        self.values = policy_net.path_values
        self.values.gamma.fill_(objective.gamma)

    def begin_epoch(self, epoch: int) -> None:
        """Hand the values on to all processes: one of them validates, and so fits them."""
        distributed.broadcast_modules([self.values])

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the ResNet on the images for which it runs, under the paths that they take."""
        assert self.trained is not None
        class_logits = self._class_logits(batch.images)  # [B, N]
        actions = self._actions(class_logits, batch.noise)  # [B, K]
        rows = actions.any(dim=1).nonzero().flatten()  # [R]
        logits = self.values.average.log_probs(class_logits)
        self.optimizer.zero_grad()
        # of all processes: a block's batch norm waits for the others
        in_all = distributed.all_reduce_sum(
            {"rows": rows.new_tensor(float(len(rows)), dtype=torch.float32)}
        )
        if in_all["rows"] > 0:
            part = Batch(
                images=batch.images[rows],
                labels=batch.labels[rows],
                noise=batch.noise[rows],
                weight=float(len(rows) / in_all["rows"]),
            )
            resnet_logits, _ = self.trained.learn(part, actions[rows])
            logits[rows] = self.values.average(class_logits[rows], resnet_logits)
            optimizer_step(self.optimizer)
        correct = logits.argmax(dim=1) == batch.labels
        return {
            "reward": self.reward(correct, actions).mean(),
            "accuracy": correct.float().mean(),
            "blocks": actions.float().sum(dim=1).mean(),
        }

    @torch.no_grad()
    def _class_logits(self, images: Tensor) -> Tensor:
        self.policy_net.eval()
        with autocast(images.device, self.precision):
            return self.policy_net.features(average_down(images, self.policy_net.input_size)).float()

    def _actions(self, class_logits: Tensor, noise: Tensor) -> Tensor:
        """[B, K] bool: the best path with probability alpha, else one of the others."""
        best = self.values.rewards(class_logits).argmax(dim=1)  # [B]
        num_paths = len(self.values.mask)
        step = 1 + (noise[:, 1] * (num_paths - 1)).long().clamp_max(num_paths - 2)  # to another path
        other = (best + step) % num_paths
        return self.values.mask[torch.where(noise[:, 0] < self.objective.alpha, best, other)]

    def validate(self, split: ImageSplit) -> Metrics:
        """Fit the values, and tell what they are worth on the same images: a little too much."""
        class_logits, answers = fit_values(
            self.policy_net,
            self.resnet,
            split,
            normalisation=self.normalisation,
            cost=self.cost,
            block_shares=self.objective.block_shares,
            precision=self.precision,
        )  # [M, N], [P, M, N]
        chosen = self.values.rewards(class_logits).argmax(dim=1)  # [M]
        logits = answers[chosen, torch.arange(len(split), device=chosen.device)]  # [M, N]
        correct = logits.argmax(dim=1) == split.labels
        actions = self.values.mask[chosen]  # [M, K]
        return {
            "accuracy": float(correct.double().mean()),
            "reward": float(self.reward(correct, actions).double().mean()),
            "active_blocks": float(self.policy_net.num_blocks),
            "flops": float(self.cost.of(actions).mean()),
            **policy_statistics(actions.cpu()),
        }
