"""Plans: break points that nest, ranks as Megatron Core deals them out, and what a configuration says of them."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ConfigError, ShardingError
from tokenlab.sharding.axes import AXES, FAR_TO_NEAR, NAMES, ROLES, attending, of_experts
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.sharding.rules import axes_of, rules_of
from tokenlab.train.config import MeshConfig, TrainConfig, default_config

PUBLISHED = {
    "tp": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)],
    "dp": [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)],
    "pp": [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)],
}  # what the documentation of Megatron Core says of 16 devices, TP 2, PP 4


@pytest.mark.parametrize("group", PUBLISHED)
def test_groups_of_ranks_are_the_published_ones(group):
    assert ParallelPlan(tp=2, dp=2, pp=4).groups(group) == PUBLISHED[group]


def by_formula(plan, group):
    """Ranks whose other coordinates are equal, by rank = tp + TP (cp + CP (dp + DP pp)) and its like of experts."""
    dense = {"tp": plan.tp, "cp": plan.cp, "dp": plan.dp, "pp": plan.pp}
    experts = {"etp": plan.etp, "ep": plan.ep, "edp": plan.edp, "pp": plan.pp}
    grid, found = dense if group in dense else experts, {}
    for rank in range(plan.devices):
        place, rest = {}, rank
        for name, size in grid.items():
            place[name], rest = rest % size, rest // size
        del place[group]
        found.setdefault(tuple(place.values()), []).append(rank)
    return sorted(map(tuple, found.values()))


def test_groups_of_every_plan_are_those_of_the_formula():
    plans = [*every_plan(8), *every_plan(12), ParallelPlan(tp=2, cp=2, dp=4, pp=2, ep=4, etp=1)]
    assert len(plans) > 60
    for plan in plans:
        for group in ("tp", "cp", "dp", "etp", "ep", "edp", "pp"):
            assert plan.groups(group) == by_formula(plan, group), (str(plan), group)


def test_the_mesh_has_the_devices_of_each_group_along_its_axes():
    for plan in every_plan(8, fsdp=True):
        mesh = plan.mesh()
        names = list(mesh.axis_names)
        ranks = np.vectorize(lambda device: device.id)(mesh.devices)
        for group in ("tp", "cp", "fsdp", "dp", "etp", "ep", "edp"):
            inside = [names.index(axis) for axis in plan.axes(group)]
            others = [place for place in range(len(names)) if place not in inside]
            size = int(np.prod([ranks.shape[place] for place in inside]))
            along = sorted(
                sorted(row) for row in ranks.transpose(*others, *inside).reshape(-1, size).tolist()
            )
            assert along == sorted(sorted(row) for row in plan.groups(group))


def test_refinement():
    plan = ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=8)
    assert plan.sizes == {"tensor_expert": 2, "sequence_expert": 2, "expert": 2}
    assert plan.axes("ep") == ("expert", "sequence_expert", "tensor_expert") and plan.edp == 1 and plan.folded
    assert plan.axes("tp") == ("tensor_expert",) and plan.axes("etp") == ()
    assert ParallelPlan(tp=4, dp=2, etp=2, ep=4).sizes == {"tensor": 2, "tensor_expert": 2, "expert": 2}
    assert ParallelPlan(dp=8, ep=8).sizes == {"expert": 8} and not ParallelPlan(dp=8, ep=8).folded
    assert ParallelPlan(tp=2, dp=4, ep=2).sizes == {"tensor": 2, "expert": 2, "data": 2}
    assert ParallelPlan(dp=8, fsdp=4, ep=2).sizes == {"fsdp_expert": 2, "fsdp": 2, "data": 2}
    assert ParallelPlan(tp=4, dp=2, etp=1, ep=2).sizes == {"tensor_expert": 2, "tensor_data": 2, "data": 2}
    assert ParallelPlan(cp=2, dp=4, etp=4, ep=2).sizes == {
        "sequence_tensor": 2,
        "data_tensor": 2,
        "expert": 2,
    }
    assert ParallelPlan(tp=2, dp=2).etp == 2  # as many as tp, unless it is said


def test_axes_are_named_by_their_roles():
    assert len(NAMES) == len(ROLES) == 12 and set(FAR_TO_NEAR) == set(ROLES) and set(AXES) < set(ROLES)
    for axis, (mine, theirs) in ROLES.items():
        if axis not in ("expert", mine):
            assert axis == f"{mine}_{theirs}"


def test_rules_follow_from_the_roles():
    plan = ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=4)  # tensor_expert, sequence_expert, data
    found = {name: axes_of(name, plan.mesh()) for name in rules_of(plan.mesh())}
    wanted = {
        "batch": ("data", "fsdp", "expert"),
        "sequence": ("sequence_expert",),
        "mlp": ("tensor", "tensor_expert"),
        "heads": ("tensor", "tensor_expert"),
        "expert": ("expert", "sequence_expert", "tensor_expert"),
        "expert_mlp": ("tensor",),
        "expert_embed": ("fsdp",),
        "expert_batch": ("data", "fsdp", "expert"),
        "expert_sequence": ("sequence_expert", "tensor_expert"),
        "group": ("data", "fsdp"),
        "places": (),
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp": 0}, r"plan: tp is 0; expected a number of devices >= 1"),
        ({"ep": 2.0}, r"plan: ep is 2\.0"),
        ({"dp": 8, "ep": 3}, r"etp 1 x ep 3 does not divide the 8 devices"),
        ({"dp": 8, "fsdp": 3}, r"fsdp 3 does not divide dp 8"),
        (
            {"tp": 2, "dp": 6, "etp": 3, "ep": 2},
            r"attention parts the devices at \[2, 2, 2, 12\].*2 does not divide 3",
        ),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ShardingError, match=message) as error:
        ParallelPlan(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_experts": 6}, r"6 experts cannot be split over ep 4"),
        ({"heads": 3}, r"3 heads cannot be split over tp 2"),
        ({"seq": 6}, r"6 tokens of an example cannot be split over cp 2 x tp 2"),
        ({"hidden": 7}, r"7 hidden units of an expert cannot be split over etp 2"),
        ({"n_layers": 3}, r"3 blocks cannot be split over pp 2"),
    ],
)
def test_what_a_model_has_must_divide(model, message):
    plan = ParallelPlan(tp=2, cp=2, dp=2, pp=2, ep=4, etp=2)
    plan.validate(num_experts=8, heads=4, seq=8, hidden=12, n_layers=4)
    with pytest.raises(ShardingError, match=message):
        plan.validate(**model)


def test_other_devices_and_stages_are_refused():
    with pytest.raises(ShardingError, match=r"needs 4 devices, but there are 8"):
        ParallelPlan(dp=4).mesh()
    with pytest.raises(ShardingError, match=r"pp is 2; a mesh has no axis of pipeline stages"):
        ParallelPlan(dp=4, pp=2).mesh()
    with pytest.raises(ShardingError, match=r"no group 'epp'\. Did you mean 'ep'"):
        ParallelPlan(dp=4).axes("epp")


def test_of_a_configuration():
    given = {"mesh.tensor": "2", "mesh.sequence": "2", "mesh.experts.expert": "8", "mesh.experts.tensor": "1"}
    config = to_dataclass(TrainConfig, override(default_config(), given)).mesh
    plan = ParallelPlan(tp=2, cp=2, dp=2, ep=8, etp=1)
    assert config.build() == plan.mesh() and config.sizes(8) == plan.sizes
    assert MeshConfig(data=2, tensor=4, experts=config.experts.__class__(2)).sizes(8) == {
        "tensor": 4,
        "expert": 2,
    }
    assert dict(MeshConfig(sequence=4).build().shape) == {
        "data": 2,
        "fsdp": 1,
        "sequence": 4,
        "tensor": 1,
        "expert": 1,
    }
    assert MeshConfig(expert=2).build().axis_names == AXES
    with pytest.raises(ConfigError, match=r"config\.mesh\.expert is 2: expected 1 where mesh\.experts says"):
        MeshConfig(expert=2, experts=config.experts)
    with pytest.raises(ConfigError, match=r"config\.mesh\.experts\.expert is 0"):
        override(default_config(), {})
        config.experts.__class__(0)
    with pytest.raises(ShardingError, match=r"does not divide the 8 devices"):
        MeshConfig(experts=config.experts.__class__(16)).build(jax.devices())


def test_names_are_read_once():
    """So that an iterator does for them."""
    assert of_experts(iter(("tensor", "data", "expert")), "expert") == ("expert",)
    assert attending(iter(("tensor", "data", "expert")), "data") == ("data", "expert")


@pytest.mark.parametrize("fsdp", [False, True])
def test_settings_make_the_plan(fsdp):
    """What a search says of a plan can be typed: a run with it has the same mesh."""
    plans = list(every_plan(8, fsdp=fsdp, beyond=True))
    assert len({tuple(plan.sizes.items()) for plan in plans}) == len(plans)
    for plan in plans:
        changes = {f"mesh.{name}": str(size) for name, size in plan.settings.items()}
        config = to_dataclass(TrainConfig, override(default_config(), changes))
        made, wanted = config.mesh.build(), plan.mesh()
        assert dict(made.shape) == dict(wanted.shape), plan
        if plan.folded:  # else the order of `make_mesh`
            assert made == wanted


def test_experts_beyond_an_example():
    """As without folding: devices that share an example have the same experts."""
    plan = ParallelPlan(tp=2, cp=2, dp=4, ep=2, beyond=True)
    assert plan.sizes == {"tensor": 2, "sequence": 2, "expert": 2, "data": 2} and not plan.folded
    assert ParallelPlan(tp=2, cp=2, dp=4, ep=2).folded and str(plan) == "tp2 cp2 dp4 | etp2 ep2 edp4 beyond"
    for sizes in ({"tp": 2, "etp": 1}, {"fsdp": 4}, {"ep": 3, "dp": 6, "fsdp": 3}):
        with pytest.raises(ShardingError, match="beyond needs etp = tp and ep x fsdp to divide dp; got etp"):
            ParallelPlan(**{"dp": 4, "ep": 2, "beyond": True} | sizes)
    with pytest.raises(ShardingError, match="config.mesh cannot say it"):
        _ = ParallelPlan(dp=8, ep=2, pp=2).settings


def test_every_plan_has_all_its_devices():
    for plan in every_plan(16, fsdp=True, beyond=True):
        assert math.prod(plan.sizes.values()) == plan.devices == 16
        ep = math.prod(plan.sizes[axis] for axis in plan.axes("ep"))
        assert (ep, math.prod(plan.sizes[axis] for axis in plan.axes("dp"))) == (plan.ep, plan.dp)
