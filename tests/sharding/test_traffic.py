"""How often collectives run and what they send, from programs that are compiled here and from text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.check import Collective
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.traffic import executed, sent, traffic

LOOP = """
HloModule step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %sum = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %sum)
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%outer (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,16]) while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (a: f32[8,16]) -> f32[32,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %t = (s32[], f32[8,16]{1,0}) tuple(%zero, %a)
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %r = f32[8,16]{1,0} get-tuple-element(%w), index=1
  ROOT %g = f32[32,16]{1,0} all-gather(%r), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
"""


def collective(kind: str, size: int, groups: tuple[tuple[int, ...], ...] | None) -> Collective:
    return Collective(kind, "c", ("f32",), ((size // 4,),), (), size, groups, "")


def test_loops_in_loops_run_as_often_as_both_say() -> None:
    assert [(found.kind, times) for found, times in executed(LOOP)] == [("all-reduce", 15), ("all-gather", 1)]
    sums, gathered = traffic(LOOP, 8)
    assert (sums.kind, sums.count, sums.bytes) == ("all-reduce", 15, 15 * 2 * 512 * 3 // 4)
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 1, 2048 * 3 // 4)


def test_a_loop_that_says_its_trips_in_its_condition_alone() -> None:
    """As the compiler for TPUs prints it."""
    bound = "%less = pred[]{:T(512)} compare(%i, %n.1), direction=LT, metadata={}"
    text = LOOP.replace("%less = pred[] compare(%a, %b), direction=LT", bound)
    text = text.replace("  ROOT %less", "  %n.1 = s32[]{:T(128)} constant(6)\n  ROOT %less")
    text = text.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert [times for _, times in executed(text)] == [18, 1]


RING = """
HloModule step

%body (p: (f32[8,16], u32[])) -> (f32[8,16], u32[]) {
  %p = (f32[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=0
  %at = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %one = f32[8,16]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %other = f32[8,16]{1,0} collective-permute(%one), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %more = u32[]{:T(128)} add(%at, %two), metadata={op_name="dot"}
  ROOT %out = (f32[8,16]{1,0}, u32[]{:T(128)}) tuple(%other, /*index=1*/%more)
}

%cond (p: (f32[8,16], u32[])) -> pred[] {
  %p = (f32[8,16]{1,0}, u32[]{:T(128)}) parameter(0)
  %bound = u32[]{:T(128)} constant(8), metadata={op_name="dot"}
  %at.1 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%at.1, %bound), direction=LT, metadata={op_name="dot"}
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %t = (f32[8,16]{1,0}, u32[]) tuple(%a, %zero)
  %w = (f32[8,16]{1,0}, u32[]) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%w), index=0
}
"""


def test_a_ring_that_is_unrolled_counts_by_two() -> None:
    (found,) = traffic(RING, 2)
    assert (found.kind, found.count, found.bytes) == ("collective-permute", 2 * 4, 8 * 512)


SPREAD = """
HloModule step

%begins (x: f32[8,16]) -> (f32[8,16], f32[32,16]) {
  %x = f32[8,16]{1,0} parameter(0)
  %g.1 = f32[32,16]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %c = (f32[8,16], f32[32,16]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (x: f32[8,16], g: f32[32,16]) -> (f32[8,16], f32[32,16]) {
  %x = f32[8,16]{1,0} parameter(0)
  %g.2 = f32[32,16]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (f32[8,16], f32[32,16]) tuple(%x, %g.2)
}

%alone (x: f32[8,16]) -> f32[32,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %g.3 = f32[32,16]{1,0} all-gather(%x), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: f32[8,16]) -> f32[32,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %s = (f32[8,16], f32[32,16]) fusion(%a), kind=kCustom, calls=%begins
  %u = (f32[8,16], f32[32,16]) fusion(%s), kind=kCustom, calls=%goes_on
  %v = (f32[8,16], f32[32,16]) fusion(%u), kind=kCustom, calls=%goes_on
  ROOT %g = f32[32,16]{1,0} fusion(%v), kind=kCustom, calls=%alone
}
"""


SCATTERED = """
HloModule step

%all-reduce-scatter.1 (x: f32[32,16]) -> f32[8,16] {
  %x = f32[32,16]{1,0} parameter(0)
  %sum = f32[32,16]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[8,16]{1,0} dynamic-slice(%sum, %at, %zero), dynamic_slice_sizes={8,16}
}

ENTRY %main (a: f32[32,16]) -> f32[8,16] {
  %a = f32[32,16]{1,0} parameter(0)
  ROOT %r = f32[8,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter() -> None:
    (found,) = traffic(SCATTERED, 4)
    assert (found.kind, found.count, found.bytes) == ("reduce-scatter", 1, 2048 * 3 // 4)


def test_a_collective_that_is_spread_over_fusions_runs_once() -> None:
    (gathered,) = traffic(SPREAD, 4)
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 2, 2 * 2048 * 3 // 4)
    assert gathered.largest == 2048


def test_a_loop_whose_trips_are_not_known_is_an_error() -> None:
    unknown = LOOP.replace('"known_trip_count":{"n":"5"}', "")
    with pytest.raises(ShardingError, match="all-reduce .* runs in a loop whose trips"):
        executed(unknown)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 300),
        ("all-reduce", 600),
        ("reduce-scatter", 1200),
        ("all-to-all", 300),
        ("collective-permute", 400),
    ],
)
def test_what_a_device_sends_on_a_ring(kind: str, expected: int) -> None:
    """Of 400 bytes of result among four devices; the operand of a reduce-scatter has four times as many."""
    assert sent(collective(kind, 400, ((0, 1, 2, 3),)), 8) == expected


@pytest.mark.parametrize(("rows", "room"), [(25, 100), (100, 25)])
def test_a_ragged_exchange_sends_the_rows_and_not_the_room_for_them(rows: int, room: int) -> None:
    """There from few rows to much room, back from much room to few rows."""
    group = ((0, 1, 2, 3),)
    found = Collective(
        "ragged-all-to-all", "c", ("f32",), ((room, 8),), ((rows, 8),), 4 * room * 8, group, ""
    )
    assert sent(found, 4) == 25 * 8 * 4 * 3 // 4


def test_without_groups_all_devices_take_part_and_alone_nothing_is_sent() -> None:
    assert sent(collective("all-gather", 800, None), 8) == 700
    assert sent(collective("all-reduce", 800, ((0,), (1,))), 8) == 0


def test_a_compiled_loop() -> None:
    """Eight products with kernels [16, 16] that are split over eight devices, and gathered each in its turn."""
    mesh = make_mesh({"fsdp": 8})

    def split(*shape: int, over: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, over))

    def run(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    x, kernels = (
        split(8, 16, over=PartitionSpec("fsdp")),
        split(8, 16, 16, over=PartitionSpec(None, None, "fsdp")),
    )
    with jax.set_mesh(mesh):
        (found,) = traffic(jax.jit(run).lower(x, kernels).compile(), 8)
    assert (found.kind, found.count, found.bytes) == ("all-gather", 8, 8 * 4 * 16 * 16 * 7 // 8)
