"""Programs with faults must be reported, and clean ones must not."""

import pytest
import torch
from cuda_builds import build_of, needs_nvcc
from ptxsim import BarrierError, DeadlockError, MemoryFault, Module, RaceError, SimError, TrapError, UninitError

pytestmark = needs_nvcc
CHECK = {"check_races": True, "check_uninit": True}


@pytest.fixture(params=["sm_80", "sm_90"])
def mod(request):
    return build_of(request.param)


@pytest.fixture
def clusters():
    """Clusters exist from sm_90 on."""
    return build_of("sm_90")


def ones(n, dtype=torch.float32):
    return torch.ones(n, dtype=dtype)


# Races


@pytest.mark.parametrize(
    ("name", "block", "args", "what"),
    [
        ("missing_sync", 128, lambda: [ones(128), ones(128)], "read by .* thread .* conflicts with the write"),
        ("war_race", 64, lambda: [torch.arange(4).float(), ones(256)], "write by .* conflicts with the read"),
        ("warp_race", 32, lambda: [torch.arange(32).float(), ones(32)], "warp 0 lane"),
        ("same_slot", 64, lambda: [ones(64)], "several warps write different values"),
    ],
)
def test_races_on_shared_memory(mod, name, block, args, what):
    with pytest.raises(RaceError, match=what):
        mod.run(name, 1, block, args(), **CHECK)
    assert "race" in mod.run(name, 1, block, args(), check_races="report").races[0]
    mod.run(name, 1, block, args())  # unchecked it runs


def test_clean_programs_pass(mod):
    y = ones(32)
    mod.run("warp_ok", 1, 32, [torch.arange(32).float(), y], **CHECK)
    assert torch.equal(y, torch.arange(31, -1, -1).float())
    mod.run("benign", 1, 64, [ones(64)], **CHECK)
    y = ones(64)
    mod.run("named_barriers", 1, 128, [torch.arange(64).float(), y, 0], **CHECK)
    assert torch.equal(y, torch.arange(63, -1, -1).float())


def test_named_barrier_left_out(mod):
    with pytest.raises(RaceError):
        mod.run("named_barriers", 1, 128, [torch.arange(64).float(), ones(64), 1], check_races=True)


def test_one_warp_writing_one_slot_is_a_warning(mod):
    stats = mod.run("same_slot", 1, 32, [ones(32)], **CHECK)
    assert "several lanes of one warp write different values" in stats.warnings[0]


@pytest.mark.parametrize("max_lanes", [32, 1024])  # a block at a time, and all at once
def test_races_between_blocks(mod, max_lanes):
    with pytest.raises(RaceError, match=r"race between blocks .* on byte .* of buffer 'arg1'"):
        mod.run("neighbour", 4, 32, [ones(4), ones(4)], check_races=True, max_lanes=max_lanes)
    with pytest.raises(RaceError, match=r"race between blocks .* (linear index 0 wrote|several blocks)"):
        mod.run("same_place", 4, 1, [ones(1), 1], check_races=True, max_lanes=max_lanes)
    mod.run("same_place", 4, 1, [ones(1), 0], check_races=True)  # all write the same
    mod.run("neighbour", 1, 32, [ones(1), ones(1)], check_races=True)  # alone it is its own neighbour
    y = ones(1)
    mod.run("handed_over", 4, 1, [ones(4), ones(1, torch.int32) * 0, y], check_races=True)  # ordered by an atomic
    assert y.item() == 6


def test_clusters_exchange_shared_memory(clusters):
    x, y = torch.randn(4, 32), torch.empty(4, 32)
    clusters.run("cluster_exchange", 4, 32, [x, y, 1, 1], poison=[y], **CHECK)
    assert torch.equal(y, x[[1, 0, 3, 2]])
    with pytest.raises(RaceError, match=r"of block . of the cluster"):
        clusters.run("cluster_exchange", 4, 32, [x, y, 0, 1], check_races=True)
    with pytest.raises(MemoryFault, match="exits and nothing orders that"):
        clusters.run("cluster_exchange", 4, 32, [x, y, 1, 0], check_races=True)


# Memory


def test_out_of_bounds(mod):
    with pytest.raises(MemoryFault, match=r"buffer 'arg0'.*CTA \(0,0,0\) thread \(2[2-9],0,0\)"):
        mod.run("oob_global", 1, 32, [ones(32), ones(32), 10])
    with pytest.raises(MemoryFault, match=r"before buffer|in no buffer|past"):
        mod.run("oob_global", 1, 32, [ones(32), ones(32), -1])
    x = ones(64)
    with pytest.raises(MemoryFault, match="inside the allocation, but outside the tensors"):
        mod.run("oob_global", 1, 32, [x[:32], ones(32), 10])
    mod.run("oob_global", 1, 32, [x, ones(32), 10])
    mod.run("oob_shared", 1, 64, [ones(64), 0])
    with pytest.raises(MemoryFault, match="shared"):
        mod.run("oob_shared", 2, 64, [ones(64), 1])


def test_strides_bound_the_accesses(mod):
    x = ones(128)
    mod.run("strided", 1, 32, [x[::4], ones(32), 4])
    for stride in (2, 3):
        with pytest.raises(MemoryFault, match="outside the tensors"):
            mod.run("strided", 1, 32, [x[::4], ones(32), stride])


def test_misaligned(mod):
    with pytest.raises(MemoryFault, match="misaligned 4-byte"):
        mod.run("misaligned", 1, 8, [ones(64, torch.int8), ones(8)])


def test_uninitialised(mod):
    with pytest.raises(UninitError, match="shared memory at byte 252"):
        mod.run("uninit_shared", 1, 64, [ones(64)], **CHECK)
    stats = mod.run("uninit_shared", 1, 64, [ones(64)], check_uninit="report")
    assert len(stats.uninit) == 1
    assert "byte 252" in stats.uninit[0]
    y = ones(32)
    with pytest.raises(UninitError, match="'arg0'"):
        mod.run("reads_output", 1, 32, [y], poison=[y])
    y = ones(40)
    stats = mod.run("strided", 1, 32, [ones(32), y, 1], poison=[y])
    assert stats.buffers["arg1"].unwritten == 32
    both = ones(64)  # poisoning a view leaves the rest of its storage alone
    mod.run("strided", 1, 32, [both[:32], both[32:], 1], poison=[both[32:]])
    assert torch.equal(both, ones(64))


def test_asynchronous_copies_must_be_waited_for(mod):
    x, y = torch.randn(2, 64, 4), torch.empty(2, 64, 4)
    mod.run("async_two_stages", 1, 64, [x, y, 0], poison=[y], **CHECK)
    assert torch.equal(y, x.flip(1))
    with pytest.raises(UninitError, match=r"cp\.async is still writing"):
        mod.run("async_two_stages", 1, 64, [x, y, 1], **CHECK)


# Barriers and control flow


def test_deadlock(mod):
    with pytest.raises(DeadlockError, match=r"(?s)32 threads.*barrier 1.*needs 64.*32 threads.*barrier 2"):
        mod.run("deadlock", 1, 64, [ones(64)])


def test_divergent_barrier(mod):
    with pytest.raises(BarrierError):
        mod.run("divergent_barrier", 1, 64, [ones(64), 7])
    mod.run("divergent_barrier", 1, 64, [ones(64), 32])  # uniform: fine


def test_endless_loop(mod):
    with pytest.raises(DeadlockError, match="step limit"):
        mod.run("endless", 1, 32, [ones(1, torch.int32) * 0], max_steps=100_000)


def test_trap(mod):
    with pytest.raises(TrapError, match=r"thread \(5,0,0\)"):
        mod.run("asserts", 1, 32, [5])
    mod.run("asserts", 1, 32, [99])


def test_spin_between_blocks(mod):
    flag, y = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    mod.run("spin_pair", 2, 1, [flag, y])
    assert y.tolist() == [6, 5]


def test_launches_that_do_not_fit(mod):
    with pytest.raises(SimError, match="parameters"):
        mod.run("strided", 1, 32, [ones(32), ones(32)])
    with pytest.raises(KeyError):
        mod.run("no_such_kernel", 1, 32, [])


def test_which_barriers_a_softmax_needs(mod):
    """softmax_rows has five barriers. Only the two between a reduction's store and load of `part` are needed: the
    reductions have separate arrays, and `buf` is ordered by the first reduction."""
    name = mod.find("softmax_rows<float, 128>")
    head, body = mod.text.split(f".entry {name}(")
    body, tail = body.split("\n}\n", 1)
    pieces = body.split("bar.sync \t0;")
    assert len(pieces) == 6
    x, caught = torch.randn(2, 512), []
    for k in range(5):
        cut = "bar.sync \t0;".join([*pieces[:k], pieces[k] + pieces[k + 1], *pieces[k + 2 :]])
        program = Module(f"{head}.entry {name}({cut}\n}}\n{tail}")
        try:
            program.launch(name, 2, 128, [x, torch.empty_like(x), 512], 2048, check_races=True)
        except RaceError:
            caught.append(k)
    assert caught == [1, 3]
