"""Spaces of configurations: what is in, what is left out and by which rule, and who lies near."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, replace

import pytest
from alexnet_triton.bench.measure.problem import Problem, configured, problems, ready, tensors
from alexnet_triton.bench.tune.short import short_list
from alexnet_triton.bench.tune.space import Space, key, listed, space
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC, KernelConfig
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import cost
from alexnet_triton.kernels.conv import Conv2dShape

BOWL = Space(
    {"x": (1, 2, 4, 8), "y": (1, 2, 3), "kind": ("a", "b"), "on": (False, True)},
    {"no two at x 2": lambda t: t["x"] != 2 or t["y"] != 2},
)


def find(name: str, batch: int, arch: int, dtype: str = "fp16", of: str = "alexnet") -> Problem:
    """One layer, planned for a GPU that need not be there."""
    return problems(Planner(network(of), ARITHMETIC[dtype], arch), dtype, batch, [name])[0]


def config_of(problem: Problem) -> KernelConfig:
    """What the planner chose for its last step."""
    assert problem.step.config is not None
    return problem.step.config


def space_of(problem: Problem, arch: int | None) -> Space:
    return space(problem.step, problem.plan.arithmetic, arch)


def test_configs_are_all_that_no_rule_leaves_out() -> None:
    configs = BOWL.configs()
    assert len(configs) == 4 * 3 * 2 * 2 - 4
    assert len({key(config) for config in configs}) == len(configs)
    assert {"x": 2, "y": 2, "kind": "a", "on": True} not in configs


def test_neighbours_differ_in_one_parameter_by_one_legal_step() -> None:
    near = BOWL.neighbours({"x": 1, "y": 2, "kind": "a", "on": False})
    assert near == [
        {"x": 4, "y": 2, "kind": "a", "on": False},  # 2 is not legal here: the next one
        {"x": 1, "y": 3, "kind": "a", "on": False},
        {"x": 1, "y": 1, "kind": "a", "on": False},
        {"x": 1, "y": 2, "kind": "b", "on": False},
        {"x": 1, "y": 2, "kind": "a", "on": True},
    ]


def test_neighbours_are_mutual() -> None:
    for here in BOWL.configs():
        assert all(here in BOWL.neighbours(near) for near in BOWL.neighbours(here))


def test_a_listed_space_is_its_list() -> None:
    configs = BOWL.configs()[::-3]
    assert listed([*configs, configs[0]]).configs() == configs, "each once, in this order"
    known = set(map(key, configs))
    assert all(key(near) in known for c in configs for near in listed(configs).neighbours(c))


@pytest.mark.parametrize(("arch", "batch"), [(80, 1), (90, 256)])
def test_every_step_of_alexnet_has_something_to_try(arch: int, batch: int) -> None:
    planner = Planner(network("alexnet"), ARITHMETIC["fp16"], arch)
    for problem in problems(planner, "fp16", batch):
        configs = space_of(problem, arch).configs()
        assert len(configs) >= 20, problem.name
        assert set(configs[0]) == set(asdict(config_of(problem))), "all fields, and no others"
        if arch < 90:
            assert not any(config.get("descriptors") for config in configs)


@pytest.mark.parametrize(
    ("name", "batch", "dtype"),
    [("conv2", 256, "fp16"), ("conv4", 1, "fp16"), ("fc7", 1, "fp16"), ("fc8", 256, "fp32")],
)
def test_launchers_take_what_the_rules_let_through(name: str, batch: int, dtype: str) -> None:
    """A sample, bound to tensors without memory; launchers refuse what would be wrong silently."""
    problem = find(name, batch, 90, dtype)
    given = tensors(problem, "meta")
    configs = space_of(problem, 90).configs()
    for config in configs[:: max(1, len(configs) // 40)]:
        variant = configured(problem, replace(config_of(problem), **config))
        assert ready(variant, given).launches


@pytest.mark.parametrize("names", [("conv1", "conv2", "conv5"), ("fc6", "fc8"), ("pool1",)])
def test_every_rule_leaves_something_out(names: tuple[str, ...]) -> None:
    """Of some network, in some layer and dtype, at some batch, for some GPU; in samples of each."""
    rules: set[str] = set()
    used: set[str] = set()
    pick = random.Random(0).choice
    cases = itertools.product(names, (1, 64), (80, 90), ("fp16", "fp32"), ("alexnet", "digits"))
    for name, batch, arch, dtype, of in cases:
        found = space_of(find(name, batch, arch, dtype, of), arch)
        rules |= found.rules.keys()
        for _ in range(200):
            config = {name: pick(values) for name, values in found.parameters.items()}
            used |= {rule for rule, holds in found.rules.items() if not holds(config)}
    idle = {rule for rule in rules - used if "group to group" not in rule}  # AlexNet has one group
    assert not idle


def test_groups_of_a_few_channels_take_no_descriptors() -> None:
    """A step from group to group must be a multiple of 16 bytes: 8 channels of 2, not 4."""
    problem = find("conv2", 256, 90)
    assert isinstance(problem.step.shape, Conv2dShape)
    step = replace(problem.step, shape=replace(problem.step.shape, groups=16))
    configs = space(step, problem.plan.arithmetic, 90).configs()
    assert {c["tiling"] for c in configs if c["descriptors"]} == {"pixels"}
    assert {c["tiling"] for c in configs} == {"rows", "pixels"}


def test_the_rules_know_the_problem() -> None:
    small, large = find("conv4", 1, 90), find("conv4", 256, 90)
    few, many = space_of(small, 90).configs(), space_of(large, 90).configs()
    assert {config["tiling"] for config in few} == {"pixels"}, "no tile of rows is half full"
    assert {config["tiling"] for config in many} == {"rows", "pixels"}
    assert max(config["SPLIT_K"] for config in few) > 1
    assert {config["SPLIT_K"] for config in many} == {1}, "there are tiles enough"
    assert any(config["BLOCK_N2"] for config in space_of(find("conv3", 256, 90), 90).configs())
    exact = space_of(find("conv4", 256, 90, "fp32"), 90).configs()
    assert max(config["BLOCK_M"] * config["BLOCK_N"] for config in exact) <= 8192


def test_the_interpreter_has_a_few_large_tiles() -> None:
    for problem in problems(Planner(network("digits"), ARITHMETIC["fp32"], None), "fp32", 2):
        configs = space_of(problem, None).configs()
        assert asdict(config_of(problem)) in configs
        assert 1 <= len(configs) <= 27


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_a_search_finds_neighbours_of_the_default(batch: int) -> None:
    """A split in six is in no list of powers of two."""
    planner = Planner(network("alexnet"), ARITHMETIC["fp16"], 90)
    for problem in problems(planner, "fp16", batch):
        made = space(problem.step, problem.plan.arithmetic, 90)
        start = asdict(config_of(problem))
        assert made.has(start), problem.name
        near = made.neighbours(start)
        moved = {name for other in near for name in other if other[name] != start[name]}
        assert len(moved) > 2 or problem.name.startswith("pool"), (problem.name, start)


@pytest.mark.parametrize(
    ("name", "dtype", "arch", "batch"),
    [
        ("alexnet", "fp16", 80, 256),
        ("alexnet", "fp16", 90, 1),
        ("alexnet", "bf16", 100, 64),
        ("alexnet_keras_bn", "tf32", 90, 256),
    ],
)
def test_a_short_list_begins_with_the_default(name: str, dtype: str, arch: int, batch: int) -> None:
    """The model chose it from the same list; what has no such list is not searched by one."""
    planner = Planner(network(name), ARITHMETIC[dtype], arch)
    for problem in problems(planner, dtype, batch):
        found = short_list(problem.step, problem.plan.arithmetic, arch, cost.chip_of(arch))
        assert bool(found) == problem.name.startswith(("conv", "fc"))
        assert found[:1] in ([], [asdict(config_of(problem))])
        assert len(found) == len({key(config) for config in found}) <= 16


def test_a_measured_operand_fill_changes_the_order_of_a_short_list() -> None:
    problem = find("conv3", 256, 90)
    slow, fast = (
        short_list(problem.step, problem.plan.arithmetic, 90, replace(cost.H200, fill=fill))
        for fill in (8.0, 64.0)
    )
    assert slow != fast
    assert sorted(map(key, slow)) == sorted(map(key, fast))
    assert slow[0]["BLOCK_M"] + slow[0]["BLOCK_M2"] > 64, "large tiles ask for fewer operands"
    exact = find("conv3", 256, 90, "fp32")
    assert short_list(exact.step, exact.plan.arithmetic, 90, cost.H200) == [], "no tensor core"
