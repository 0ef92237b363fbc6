"""Reading collectives out of compiled programs, and telling those that move activations across the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError
from tokenlab.sharding import check
from tokenlab.sharding.constrain import constrain
from tokenlab.sharding.mesh import make_mesh

B, N, D, K = 88, 12, 16, 4  # 11 examples on each of 8 devices, and 11 divides nothing else
BATCH = PartitionSpec(("data", "fsdp"))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 4})


def compiled(mesh, function, *arguments, **options):
    """Compile for arguments given as (shape, dtype, spec)."""
    arguments = [
        ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function, **options).lower(*arguments).compile()


X = ((B, N, D), jnp.float32, BATCH)
SCORES = ((B, N), jnp.float32, BATCH)
INDICES = ((B, K), jnp.int32, BATCH)
Y = ((B, K, D), jnp.float32, BATCH)
W = ((D, D), jnp.float32, PartitionSpec("fsdp"))


def batched_top_k(scores):
    return jax.lax.top_k(scores, K)[1]


def batched_scatter(x, indices, y):
    return x.at[jnp.arange(B)[:, None], indices].add(y)


def batched_gather(x, indices):
    return x[jnp.arange(B)[:, None], indices]


class TestKnownBad:
    @pytest.mark.parametrize(
        ("function", "arguments", "kinds", "shape"),
        [
            (batched_top_k, (SCORES,), {"all-gather"}, (B, N)),
            (batched_scatter, (X, INDICES, Y), {"all-gather"}, (B, K, D)),
            # The gather hides its move in a reduction: each device fills in what it has, and all of it is summed.
            (batched_gather, (X, INDICES), {"all-gather", "all-reduce"}, (B, K, D)),
            (lambda x: jnp.roll(x, 1, axis=0), (X,), {"collective-permute"}, (1, N, D)),
            (lambda x: constrain(x.reshape(B * N, D)[::-1], None, None), (X,), {"all-gather"}, (B * N, D)),
            (lambda x: jnp.cumsum(x, axis=0), (X,), None, None),
        ],
        ids=["top_k", "scatter", "gather", "roll", "merged", "cumsum"],
    )
    def test_is_found(self, mesh, function, arguments, kinds, shape):
        program = compiled(mesh, function, *arguments)
        found = check.activation_collectives(program, B, mesh, parameters={"w": jnp.ones((D, D))})
        assert found
        if kinds is not None:
            assert {collective.kind for collective in found} == kinds
            assert any(shape in collective.shapes for collective in found)
        with pytest.raises(
            ShardingError, match=r"^\d+ collectives move activations across the batch: "
        ) as error:
            check.assert_no_activation_collective(program, B, mesh)
        assert "\n" not in str(error.value)

    def test_an_exchange_between_axes(self, mesh):
        program = compiled(
            mesh,
            lambda x: x,
            X,
            out_shardings=NamedSharding(mesh, PartitionSpec(None, None, ("data", "fsdp"))),
        )
        (found,) = check.activation_collectives(program, B, mesh)
        assert found.kind == "all-to-all"
        assert set(found.groups[0]) == set(range(8))


class TestKnownGood:
    @pytest.mark.parametrize(
        ("function", "arguments"),
        [
            (lambda scores: jnp.argsort(-scores, axis=1)[:, :K], (SCORES,)),
            (jax.vmap(lambda x, indices, y: x.at[indices].add(y)), (X, INDICES, Y)),
            (jax.vmap(lambda x, indices: x[indices]), (X, INDICES)),
            (lambda x: jnp.mean(x**2), (X,)),
        ],
        ids=["argsort", "scatter", "gather", "mean"],
    )
    def test_is_passed(self, mesh, function, arguments):
        program = compiled(mesh, function, *arguments)
        assert check.activation_collectives(program, B, mesh) == []
        check.assert_no_activation_collective(program, B, mesh)

    def test_a_step_with_fsdp(self, mesh):
        """Parameters are gathered, gradients and the loss are summed: collectives, but not of activations."""

        def step(w, x):
            def loss(w):
                scores = jnp.linalg.norm(x, axis=-1)
                kept = jnp.argsort(-scores, axis=1)[:, :K]
                y = jax.vmap(lambda x, indices: x[indices])(x, kept)
                y = constrain(jax.nn.gelu(y @ w), "batch", None, None)
                y = constrain(jax.vmap(lambda x, i, y: x.at[i].add(y))(x, kept, y @ w), "batch", None, None)
                return jnp.mean(y**2)

            value, gradient = jax.value_and_grad(loss)(w)
            return value, w - 0.1 * gradient

        outputs = (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp")))
        program = compiled(mesh, step, W, X, out_shardings=outputs)
        found = check.collectives(program)
        assert {"all-gather", "all-reduce"} <= {collective.kind for collective in found}
        assert check.activation_collectives(program, B, mesh, parameters={"w": jnp.ones((D, D))}) == []
        gathers = [collective for collective in found if collective.kind == "all-gather"]
        assert gathers[0].shapes == ((D, D),)
        assert gathers[0].operand_shapes == ((D // 4, D),)
        assert gathers[0].dtypes == ("f32",)
        assert gathers[0].bytes == D * D * 4
        assert {frozenset(group) for group in gathers[0].groups} == {
            frozenset(range(4)),
            frozenset(range(4, 8)),
        }
        assert gathers[0].crosses(mesh, ("fsdp",))
        assert not gathers[0].crosses(mesh, ("data", "tensor", "expert"))
        assert "dot_general" in gathers[0].source or gathers[0].source == "w"

    def test_parameters_dealt_out_along_another_axis(self):
        """With three axes XLA passes shards of parameters on by permutes across the batch axes."""
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        w = ((D, 10), jnp.float32, PartitionSpec("fsdp"))
        program = compiled(mesh, lambda x, w: jnp.mean(x, axis=1) @ w, ((44, N, D), jnp.float32, BATCH), w)
        moves = [
            collective for collective in check.collectives(program) if collective.kind == "collective-permute"
        ]
        assert [collective.shapes for collective in moves] == [((D // 2, 10),)]
        assert moves[0].crosses(mesh, ("fsdp",))
        parameters = {"w": ShapeDtypeStruct(w[0], w[1], sharding=NamedSharding(mesh, w[2]))}
        assert check.activation_collectives(program, 44, mesh, parameters=parameters) == []
        assert check.activation_collectives(program, 44, mesh) == moves
        others = {"w": ShapeDtypeStruct((D, 9), w[1], sharding=NamedSharding(mesh, w[2]))}
        assert check.activation_collectives(program, 44, mesh, parameters=others) == moves

    def test_tensor_parallelism_stays_within_its_examples(self):
        mesh = make_mesh({"data": 4, "tensor": 2})
        w = ((D, D), jnp.float32, PartitionSpec("tensor"))
        x = ((44, N, D), jnp.float32, PartitionSpec("data", None, "tensor"))
        program = compiled(mesh, lambda x, w: constrain(x @ w, "batch", None, None), x, w)
        (found,) = check.collectives(program)
        assert found.kind == "all-reduce"
        assert 11 in {size for shape in found.shapes for size in shape} or 11 * N in found.shapes[0]
        assert check.activation_collectives(program, 44, mesh) == []
        assert check.activation_collectives(program, 22, mesh, axes=("tensor",)) == [found]


class TestMistakes:
    def test_batch_sizes_that_cannot_tell(self, mesh):
        with pytest.raises(ShardingError, match="batch 90 on 8 devices"):
            check.activation_collectives("", 90, mesh)
        with pytest.raises(ShardingError, match="batch 8 on 8 devices"):
            check.activation_collectives("", 8, mesh)
        with pytest.raises(
            ShardingError, match=r"head/w has shape \(16, 22\), in which 11 examples per device divide"
        ):
            check.activation_collectives("", 88, mesh, parameters={"head": {"w": jnp.ones((16, 22))}})
        with pytest.raises(ShardingError, match="the batch is not split"):
            check.activation_collectives("", 88, make_mesh({"tensor": 8}))

    def test_unknown_groups(self):
        line = "  %x = f32[8]{0} all-reduce(%p), replica_groups=something_new, to_apply=%add"
        with pytest.raises(ShardingError, match="unknown form: 'something_new"):
            check.collectives(line)


class TestForms:
    """The forms XLA prints, on other devices and in other versions than those of the tests."""

    def one(self, text):
        (found,) = check.collectives(text)
        return found

    def test_operands_with_types_and_tiled_layouts(self):
        found = self.one(
            "  ROOT %all-gather.3 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(bf16[16,128]{1,0:T(8,128)(2,1)} %p.1), "
            'channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(f)/dot"}'
        )
        assert (found.kind, found.name, found.source) == ("all-gather", "all-gather.3", "jit(f)/dot")
        assert (found.dtypes, found.shapes, found.operand_shapes) == (("bf16",), ((64, 128),), ((16, 128),))
        assert found.bytes == 64 * 128 * 2
        assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
        assert str(found) == "all-gather bf16[64,128] (16384 bytes) from jit(f)/dot"

    def test_asynchronous_gather(self):
        text = (
            "  %p = f32[2,3]{1,0} parameter(0)\n"
            "  %s = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}\n"
            "  %d = f32[8,3]{1,0} all-gather-done(%s)\n"
        )
        found = self.one(text)
        assert (found.kind, found.shapes, found.operand_shapes, found.bytes) == (
            "all-gather",
            ((8, 3),),
            ((2, 3),),
            96,
        )
        assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))

    def test_asynchronous_gather_of_two_with_typed_operands(self):
        found = self.one(
            "  %s = ((f32[2]{0}, s8[2]{0}), (f32[8]{0}, s8[8]{0}), u32[], u32[]) "
            "all-gather-start(f32[2]{0} %a, s8[2]{0} %b), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}"
        )
        assert found.dtypes == ("f32", "s8")
        assert found.shapes == ((8,), (8,))
        assert found.bytes == 40
        assert found.groups == ((0, 4), (1, 5), (2, 6), (3, 7))

    def test_asynchronous_permute(self):
        found = self.one(
            "  %s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(f32[4]{0} %a), "
            "source_target_pairs={{0,1},{1,0}}"
        )
        assert (found.kind, found.shapes, found.bytes) == ("collective-permute", ((4,),), 16)
        assert found.groups == ((0, 1), (1, 0))

    def test_asynchronous_reduction_of_two(self):
        found = self.one(
            "  %s = (f32[4]{0}, bf16[]) all-reduce-start(f32[4]{0} %a, bf16[] %b), replica_groups={}, to_apply=%add"
        )
        assert (found.shapes, found.operand_shapes, found.bytes) == (((4,), ()), ((4,), ()), 18)
        assert found.groups is None

    def test_exchange_of_a_tuple_with_comments(self):
        found = self.one(
            "  %a2a = (pred[2,3]{1,0}, pred[2,3]{1,0}, /*index=2*/pred[2,3]{1,0}) all-to-all(pred[2,3]{1,0} %a, "
            "pred[2,3]{1,0} %b, /*index=2*/pred[2,3]{1,0} %c), replica_groups={{0,1,2}}"
        )
        assert found.shapes == ((2, 3),) * 3
        assert found.bytes == 18

    def test_small_and_wide_types(self):
        found = self.one("  %r = (s4[3], c64[2], f8e4m3fn[5]) all-reduce(%a), replica_groups={{0,1}}")
        assert found.bytes == 2 + 16 + 5

    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
            ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
            ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
            ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
            ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
            ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
            ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
            ("@mesh<a=2,b=2>, {a}", ((0, 2), (1, 3))),
            ("mesh['a'=2] {}", ((0,), (1,))),
        ],
    )
    def test_groups_as_axes_of_a_mesh(self, groups, expected):
        text = f"  %r = f32[] all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add"
        assert self.one(text).groups == expected

    def test_what_is_no_collective(self):
        text = (
            "HloModule jit_f, replica_count=1, num_partitions=8\n"
            "%add (x: f32[], y: f32[]) -> f32[] {\n"
            "  %f = f32[8]{0} fusion(%all-gather.1), kind=kLoop, calls=%c\n"
            '  %c = f32[8]{0} custom-call(%p), custom_call_target="all-gather(x)"\n'
        )
        assert check.collectives(text) == []


def test_unsharded(mesh):
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {
        "small": jax.device_put(jnp.ones(4), whole),
        "large": {"whole": jax.device_put(jnp.ones((64, 8)), whole)},
        "larger": ShapeDtypeStruct((1024,), jnp.float32, sharding=whole),
        "split": jax.device_put(jnp.ones((64, 8)), split),
        "single": jnp.ones((64, 8)),
        "abstract": ShapeDtypeStruct((1024,), jnp.float32),
    }
    assert check.unsharded(state, 2048) == [
        "larger float32[1024] 4096 bytes",
        "large/whole float32[64,8] 2048 bytes",
    ]
    assert check.unsharded(state) == []
