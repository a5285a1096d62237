"""Reading program text: loops, sizes, bytes, collectives."""

from __future__ import annotations

import pytest

from maskae.planning.chips import parse_topology
from maskae.planning.collectives import first_group, gpu_seconds, program_collectives, wire_bytes
from maskae.planning.program import parse_program
from maskae.planning.traffic import hbm_bytes

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p: f32[12,256], i: s32[]) -> f32[256] {
  %p = f32[12,256]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one_row = f32[1,256]{1,0:T(1,128)} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %row = f32[256]{0:T(256)} bitcast(%one_row)
}

%body (state: (s32[], f32[12,256], f32[256])) -> (s32[], f32[12,256], f32[256]) {
  %state = (s32[]{:T(128)}, f32[12,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) parameter(0)
  %counter = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %table = f32[12,256]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %fused = f32[256]{0:T(256)S(1)} fusion(%table, %counter), kind=kLoop, calls=%sliced
  %summed = f32[256]{0:T(256)S(1)} all-reduce(%fused), channel_id=3, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %link_0 = f32[1024]{0:T(1024)S(1)} all-gather(%fused), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  %link_1 = f32[1024]{0:T(1024)S(1)} all-gather(%fused), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  %out = f32[256]{0:T(256)} copy(%summed)
  ROOT %next = (s32[]{:T(128)}, f32[12,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) tuple(%counter, %table, %out)
}

%condition (state.1: (s32[], f32[12,256], f32[256])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[12,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %limit), direction=LT
}

ENTRY %main (x: f32[12,256]) -> f32[256] {
  %x = f32[12,256]{1,0:T(8,128)} parameter(0)
  %start = (s32[]{:T(128)}, f32[12,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) tuple(%x, %x)
  %loop = (s32[]{:T(128)}, f32[12,256]{1,0:T(8,128)}, f32[256]{0:T(256)}) while(%start), condition=%condition, body=%body
  %result = f32[256]{0:T(256)} get-tuple-element(%loop), index=2
  ROOT %negative = f32[256]{0:T(256)} negate(%result)
}
"""


def test_loops_count_as_often_as_their_condition_says():
    program = parse_program(TEXT)
    assert program.entry == "main" and program.loops() == [12]
    assert [times for _, line, times in program.executed() if line.name == "fused"] == [12]


def test_a_noted_trip_count_comes_first():
    noted = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert parse_program(noted).loops() == [5]


def test_a_loop_of_unknown_length_is_an_error_and_not_a_wrong_number():
    with pytest.raises(ValueError, match="no constant length"):
        parse_program(TEXT.replace("direction=LT", "direction=NE")).loops()


def test_a_loop_that_its_data_ends_counts_once():
    ended = TEXT.replace("compare(%counter.1, %limit), direction=LT", "and(%less_far, %rejected)")
    assert ended != TEXT and parse_program(ended).loops() == [1]


def test_padding_and_memory_spaces():
    lines = parse_program("ENTRY %main () -> f32[] {\n  %x = bf16[3,5,130]{2,0,1:T(8,128)(2,1)S(1)} constant(0)\n}\n").by_name["main"]
    (array,) = lines["x"].arrays
    assert array.physical == 8 * 5 * 256  # dimension 2 is minor, then 0, then 1
    assert array.payload == 3 * 5 * 130 * 2 and array.bytes == array.physical * 2 and array.on_chip


def test_bytes_count_slices_once_per_iteration_and_scratch_memory_not_at_all():
    row = 256 * 4
    # In the loop the fusion reads one row and the copy writes one; after it the negation reads and writes one.
    assert hbm_bytes(parse_program(TEXT)) == 12 * (row + row) + 2 * row


def test_collectives_in_loops_count_with_the_trips_and_chains_once():
    topology = parse_topology("v5e:2x4")
    coordinates = [(row, column) for row in range(2) for column in range(4)]
    gathered, summed = program_collectives(parse_program(TEXT), topology, coordinates)
    assert (summed.kind, summed.group, summed.count, summed.payload) == ("all-reduce", 4, 12, 12 * 1024)
    assert (gathered.kind, gathered.group, gathered.count, gathered.payload) == ("all-gather", 4, 12, 12 * 4096)
    assert summed.wire == pytest.approx(12 * 1024 * 2 * 3 / 4) and gathered.wire == pytest.approx(12 * 4096 * 3 / 4)
    # {0, 2, 4, 6} takes the link between the rows and half of those along them, {0, 1, 2, 3} one row; a link is 50 GB/s.
    assert summed.seconds == pytest.approx(summed.wire / 75e9) and gathered.seconds == pytest.approx(gathered.wire / 50e9)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", [0, 1]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", list(range(8))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", [0, 1]),
        ("source_target_pairs={{1,3},{3,1}}", [1, 3]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_in_every_notation(attributes, group):
    assert first_group(attributes, 8) == group


def test_wire_bytes_of_bandwidth_optimal_rings():
    assert wire_bytes("all-reduce", 4, 100.0) == 150 and wire_bytes("all-gather", 4, 100.0) == 75
    assert wire_bytes("reduce-scatter", 2, 100.0) == 50 and wire_bytes("collective-permute", 2, 100.0) == 100


def test_gpus_sum_within_nodes_first():
    within, across = parse_topology("h100:8"), parse_topology("h100:16")
    assert gpu_seconds(within, "all-reduce", 8, 1, 8e9) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9)
    between = 2 * (1 / 2) * 1e9 / 50e9  # an eighth of the array, over two nodes
    assert gpu_seconds(across, "all-reduce", 16, 1, 8e9) == pytest.approx(2 * 7 / 8 * 8e9 / 450e9 + between)
    assert gpu_seconds(across, "all-reduce", 2, 8, 8e9) == pytest.approx(2 * (1 / 2) * 8e9 / 50e9)  # one GPU of each node
