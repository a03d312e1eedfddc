"""Learning a policy, with a frozen ResNet (the curriculum) or a learning one (joint finetuning).

Shapes: B images of a batch, K blocks, N classes.
"""

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.split import ImageSplit
from pipeline.data.transforms import Normalisation
from pipeline.device import autocast
from pipeline.inference.auto import make_executor
from pipeline.inference.base import Networks
from pipeline.inference.predict import predict, predict_policy
from pipeline.models.policies import greedy_actions, policy_statistics
from pipeline.models.policy_net import PolicyNet
from pipeline.models.resnet import ResNet
from pipeline.policy import objectives
from pipeline.policy.curriculum import active_mask, keep_inactive, num_active_blocks
from pipeline.policy.estimators import (
    Estimator,
    JointEstimator,
    PolicyOutput,
    StepMetrics,
    frozen_estimator,
    joint_estimator,
)
from pipeline.policy.objectives import Phase, PolicyObjective, Reward
from pipeline.policy.trained_resnet import TrainedResNet
from pipeline.training.distillation import Distillation
from pipeline.training.loop import Batch, Metrics
from pipeline.training.optim import backward, optimizer_step


class PolicyLearner:
    """A step: decide, estimate the gradient of the expected reward, add the entropies, move.

    Frozen, the ResNet stays in evaluation mode: no weight and no batch-norm statistic moves. In
    finetuning the sampled pass trains it, and a block's batch statistics are those of the images that
    run it. (In the authors' finetuning images that drop the block move them too.)

    Unlike in the paper, the policy may be fixed after `train_epochs`: as long as actions are sampled,
    the ResNet learns on paths other than those that it will be run on. And it may wait for the first
    `frozen_epochs`: a ResNet that was never run without a block loses much by every drop, so a policy
    that learns beside it from the start may first learn to keep more than it began with.

    Args:
        distillation: the ResNet's loss; None: the ResNet is frozen.

    Raises:
        ValueError: the estimator does not fit a frozen or learning ResNet.
    """

    def __init__(
        self,
        resnet: ResNet,
        policy_net: PolicyNet,
        *,
        optimizer: torch.optim.Optimizer,
        objective: PolicyObjective,
        normalisation: Normalisation,
        precision: str,
        distillation: Distillation | None,
    ) -> None:
        if (objective.train_epochs is not None or objective.frozen_epochs) and distillation is None:
            raise ValueError("with a waiting or fixed policy and a frozen ResNet nothing would learn")
        self.resnet = resnet
        self.policy_net = policy_net
        self.optimizer = optimizer
        self.objective = objective
        self.normalisation = normalisation
        self.precision = precision
        self.device = next(policy_net.parameters()).device
        self.reward = Reward(objective, self.device)
        self.modules: dict[str, nn.Module] = {"policy_net": policy_net}
        self.joint: tuple[TrainedResNet, JointEstimator] | None = None
        self.estimator: Estimator
        if distillation is not None:
            self.modules["resnet"] = resnet
            trained = TrainedResNet(resnet, distillation=distillation, precision=precision)
            self.estimator = joint_estimator(trained, objective, self.reward)
            self.joint = trained, self.estimator
        else:  # frozen weights are packed once, and dropped blocks cost no time
            networks = Networks(resnet=resnet, policy_net=None, normalisation=normalisation)
            executor = make_executor(networks, precision=precision)
            self.estimator = frozen_estimator(executor, objective, self.reward)
        self.noise_columns = resnet.num_blocks * self.estimator.noise_tables
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Set whether the policy learns, which blocks it decides, and what the entropy weighs."""
        self.phase: Phase = self.objective.phase_of(epoch)
        self.entropy_coef = self.objective.entropy_coef_of(epoch)
        num_blocks, pace = self.resnet.num_blocks, self.objective.epochs_per_block
        self.num_active = num_blocks
        if pace is not None:
            self.num_active = num_active_blocks(epoch, num_blocks=num_blocks, epochs_per_block=pace)
        self.active = active_mask(self.num_active, num_blocks, self.device)  # [K]

    def decide(self, batch: Batch) -> PolicyOutput:
        """The policy for a batch, with one set of sampled actions."""
        with autocast(batch.images.device, self.precision):
            logits = self.policy_net(batch.images)
        logits = logits.float()  # [B, K]
        keep_prob = torch.sigmoid(logits)  # s
        sampling_prob = objectives.bounded_sampling_prob(keep_prob, self.objective.alpha)  # s'
        noise = batch.noise[:, : self.resnet.num_blocks]
        return PolicyOutput(
            logits=logits,
            sampling_prob=sampling_prob,
            sampled=keep_inactive(noise < sampling_prob, self.active),
            greedy=keep_inactive(greedy_actions(keep_prob), self.active),
            active=self.active,
            num_active=self.num_active,
        )

    def step(self, batch: Batch) -> StepMetrics:
        """One step on the mean over the batch of policy gradient, entropy and classification loss."""
        self.optimizer.zero_grad()
        if self.joint is not None and self.phase != "learning":
            return self._step_resnet_only(batch, *self.joint)
        self.policy_net.train()
        policy = self.decide(batch)
        policy_loss, metrics = self.estimator(batch, policy)  # leaves the ResNet's gradients
        entropy = objectives.entropy(policy.logits, self.active).mean()
        loss = policy_loss - self.entropy_coef * self._bonus(policy, entropy)
        if self.objective.marginal_entropy_coef:
            keep_prob = torch.sigmoid(policy.logits)
            mean = distributed.all_reduce_mean(keep_prob, batch.weight)  # over all processes, [K]
            loss = loss + self.objective.marginal_entropy_coef * objectives.marginal_entropy_loss(
                keep_prob, mean, self.active
            )
        backward(loss, batch)
        optimizer_step(self.optimizer)
        per_decision = entropy.detach() / self.num_active  # at most ln 2
        return {**metrics, "policy_entropy": per_decision, "policy_loss": policy_loss.detach()}

    def _bonus(self, policy: PolicyOutput, entropy: Tensor) -> Tensor:
        if self.objective.entropy == "authors":
            return objectives.authors_entropy(policy.sampling_prob).mean()
        return entropy

    def _step_resnet_only(
        self, batch: Batch, resnet: TrainedResNet, estimator: JointEstimator
    ) -> StepMetrics:
        """The ResNet learns under a policy that has no gradient, so that its optimiser leaves it alone.

        Fixed, the policy decides as it is deployed. While it waits, its actions are sampled as when it
        learns, by the batch's statistics.
        """
        waits = self.phase == "frozen"
        self.policy_net.train(waits)
        with torch.no_grad():
            policy = self.decide(batch)
        actions = policy.sampled if waits else policy.greedy
        logits, losses = resnet.learn(batch, actions)
        optimizer_step(self.optimizer)
        metrics = estimator.metrics(batch, actions, logits, losses)
        entropy = objectives.entropy(policy.logits, self.active).mean() / self.num_active
        return {**metrics, "policy_entropy": entropy, "policy_loss": torch.zeros_like(entropy)}

    def validate(self, split: ImageSplit) -> Metrics:
        """The greedy policy: accuracy, reward, and how much it differs from image to image."""
        logits = predict_policy(
            self.policy_net, split, normalisation=self.normalisation, precision=self.precision
        )  # [M, K], on the CPU
        active = self.active.cpu()
        actions = keep_inactive(greedy_actions(torch.sigmoid(logits)), active)
        predictions = predict(
            self.resnet, split, actions, normalisation=self.normalisation, precision=self.precision
        )
        entropy = objectives.entropy(logits, active).mean() / self.num_active
        return {
            "accuracy": predictions.accuracy,
            "reward": float(self.reward(predictions.correct, actions).mean()),
            "policy_entropy": float(entropy),
            "active_blocks": float(self.num_active),
            **policy_statistics(actions),
        }
