"""The benchmark shows who sleeps and who cheats, and what it says can be recomputed from its tables."""

import time

import pytest
import torch
from test_executors import make_images, make_networks

from pipeline.benchmark import Benchmark, Full, Settings, agreement
from pipeline.cost import measure
from pipeline.executors.base import Executor, Output
from pipeline.executors.gather import Gather


class Sleepy(Gather):
    """Right, and slow."""

    name = "sleepy"

    def _run(self, images, actions):
        time.sleep(0.05)
        return super()._run(images, actions)


class Cheat(Gather):
    """Fast, because it asks no policy network: one policy for all."""

    name = "cheat"

    def _decide(self, inputs):
        actions = torch.zeros(len(inputs), self.networks.num_blocks, dtype=torch.bool)
        actions[:, 0] = True
        return actions


class Liar(Gather):
    """The right actions, with logits that do not come from them."""

    name = "liar"

    def _classify(self, inputs, actions):
        return torch.zeros(len(inputs), self.networks.resnet.num_classes)


class Broken(Gather):
    """Gives nothing."""

    name = "broken"

    def _run(self, images, actions):
        return Output(logits=torch.zeros(len(images), 5), actions=torch.zeros(len(images), 6) > 0)


def settings(**changes) -> Settings:
    return Settings(
        **{
            "batch_sizes": [32], "precisions": ["fp32"], "executors": ["masked", "gather"],
            "kept_shares": [0.0, 1.0], "few_policies": 20, "sole_depths": [8], "rounds": 5,
            "seconds": 0.0, "with_compile": False, **changes,
        }
    )  # fmt: skip


def make_benchmark(*extra: type[Executor], **changes) -> Benchmark:
    networks = make_networks()
    return Benchmark(
        networks,
        full=networks.resnet,
        images=make_images(40),
        cost=measure(networks.resnet, networks.policy_net, 16),
        settings=settings(**changes),
        extra={kind.name: kind(networks) for kind in extra},
    )


def run(*extra: type[Executor], **changes) -> tuple[Benchmark, dict[str, list[dict]]]:
    benchmark = make_benchmark(*extra, **changes)
    return benchmark, benchmark.run(lambda _: None)


def row_of(tables, name: str) -> dict:
    (row,) = [row for row in tables["times"] if row["contestant"] == name]
    return row


def test_a_sleeper_is_shown_as_slow():
    _, tables = run(Sleepy)
    assert row_of(tables, "sleepy")["milliseconds"] > 50
    assert row_of(tables, "sleepy")["agrees"]
    assert row_of(tables, "sleepy")["speedup"] < row_of(tables, "gather")["speedup"]
    assert tables["answers"][0]["executor"] != "sleepy"


@pytest.mark.parametrize(("kind", "what"), [(Cheat, "same_decisions"), (Liar, "same_classes")])
def test_a_cheat_is_shown_and_wins_nothing(kind, what):
    _, tables = run(kind)
    row = row_of(tables, kind.name)
    assert row[what] < 0.999
    assert not row["agrees"]
    assert not row["reliable"]
    assert tables["answers"][0]["executor"] in ("gather", "masked")


def test_nobody_who_agrees_is_no_answer():
    said = []
    benchmark = make_benchmark(Broken, executors=[])
    (answer,) = benchmark.run(said.append)["answers"]
    assert not answer["reliable"]
    assert "speedup" not in answer
    assert "nothing is claimed" in said[0]


def test_tables_agree_with_each_other():
    benchmark, tables = run(batch_sizes=[16, 40], executors=["gather", "grouped"])
    assert [answer["batch"] for answer in tables["answers"]] == [16, 40]
    for answer in tables["answers"]:
        rows = {r["contestant"]: r for r in tables["times"] if r["batch"] == answer["batch"]}
        static = {name: r["milliseconds"] for name, r in rows.items() if r["kind"] == "static"}
        assert set(static) == {"eager", "packed", "gather, all blocks", "grouped, all blocks"}
        assert rows["ResNet-8"]["kind"] == "sole"
        assert answer["best_static"] == min(static, key=static.get)
        assert rows[answer["best_static"]]["speedup"] == 1
        fastest = rows[answer["executor"]]
        assert answer["speedup"] == fastest["speedup"]
        assert fastest["speedup"] == pytest.approx(min(static.values()) / fastest["milliseconds"])
        assert answer["share_of_ideal"] == pytest.approx(answer["speedup"] / answer["ideal"])
        assert fastest["rounds"] == 5
        of_this = [r for r in tables["sweep"] if r["batch"] == answer["batch"]]
        variants = ["many"] if answer["batch"] == 16 else ["few", "many"]
        assert [(r["variant"], r["kept_share"]) for r in of_this] == [
            (variant, share) for variant in variants for share in (0.0, 1.0)
        ]
    assert {row["batch"] for row in tables["parts"]} == {16, 40}
    assert all(row["policy_network_ms"] > row["index_ms"] > 0 for row in tables["parts"])
    assert benchmark.left_out == {}


def test_ideal_counts_the_policy_network_and_the_images_that_were_timed():
    networks = make_networks()
    cost = measure(networks.resnet, networks.policy_net, 16)
    benchmark, tables = run(batch_sizes=[40])
    actions = Gather(networks)(benchmark.images).actions
    expected = cost.full / float(cost.of(actions).mean())
    assert row_of(tables, "gather")["ideal"] == pytest.approx(expected)
    assert cost.policy_net > 0


def test_what_cannot_run_is_left_out_and_named():
    benchmark, tables = run(executors=["gather", "persistent"])
    assert list(benchmark.left_out) == ["persistent fp32"]
    assert not [row for row in tables["times"] if "persistent" in row["contestant"]]


def test_rounds_take_turns_through_all_test_images():
    benchmark = make_benchmark()
    rounds = benchmark._rounds(4)
    assert rounds.rows.shape == (5, 8, 4)  # 32 images a round at least
    assert rounds.rows.flatten().tolist() == [i % 40 for i in range(160)]
    assert torch.equal(rounds.batches[1][2], benchmark.images[rounds.rows[1, 2]])


def test_a_sweep_runs_the_policy_network_and_takes_the_given_actions():
    benchmark = make_benchmark()
    rounds = benchmark._rounds(4)
    ran = []
    policies = rounds.policies(6, kept_share=0.5, distinct=None, draw=torch.Generator())
    rounds.forced(
        lambda images, actions: ran.append((images, actions)),
        lambda images: ran.append(images),
        policies,
    )(3)
    assert len(ran) == 16
    for index, (images, actions) in enumerate(zip(rounds.batches[3], policies[3], strict=True)):
        assert torch.equal(ran[2 * index], images)
        assert torch.equal(ran[2 * index + 1][1], actions)


def test_agreement_counts_decisions_and_classes_under_them():
    def executor(flips: list[int], wrong: list[int]):
        def run(images, actions=None):
            decided = torch.ones(4, 3) > 0
            decided[flips] = False
            taken = decided if actions is None else actions
            classes = taken.sum(dim=1)
            classes[wrong] += 1
            return Output(logits=torch.nn.functional.one_hot(classes, 5).float(), actions=taken)

        return run

    batches = [make_images(4), make_images(4)]
    reference = executor([], [])
    assert agreement(executor([], []), reference, batches) == (1, 1)
    assert agreement(executor([2], []), reference, batches) == (0.75, 1)  # right about what it ran
    assert agreement(executor([], [0]), reference, batches) == (1, 0.75)


def test_peak_memory_has_what_calls_before_have_left_on_the_device(monkeypatch):
    allocated = {"now": 100, "most": 0}

    class Hoarder(Gather):
        """Keeps a scratch of 8 MiB."""

        held = 0

        def _run(self, images, actions):
            if not self.held:
                self.held = 8 * 2**20
                allocated["now"] += self.held
            allocated["most"] = max(allocated["most"], allocated["now"] + 2**20)
            return super()._run(images, actions)

        def free(self):
            allocated["now"] -= self.held
            self.held = 0

    for name, found in {
        "synchronize": None,
        "reset_peak_memory_stats": lambda: allocated.update(most=0),
        "memory_allocated": lambda: allocated["now"],
        "max_memory_allocated": lambda: allocated["most"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found and found())
    benchmark = make_benchmark()
    hoarder = Hoarder(benchmark.networks)
    for run in (hoarder, Full(hoarder)):
        call = benchmark._rounds(32).on(run)
        call(0)
        assert benchmark._peak_memory(run, call) == 9
