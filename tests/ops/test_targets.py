"""The Triton rows' kernels, compiled for GPUs that are not here: each compiles, and its program fits the shared memory there."""

from __future__ import annotations

import pytest
from printed import printed

from gdn.core import device as hardware

DESK = (
    ["rule 128", "crowded rule 128", "rule 200", "rule 256"],
    ["channel rule 128", "channel rule 256", "linear 256", "value gated 256", "sigmoid 128", "sigmoid 256", "long sigmoid 256"],
)

STEPS = ["step 512", "four steps 128", "channel step 512", "product step 512"]
PRODUCTS = ["two writes 128", "three writes 256", "four writes 200", "crowded four writes 128"]
FEW = ["few tokens"]
LINEAR_STEPS = ["linear step 512", "gated linear step 200", "value gated linear step 96"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "room", "calls"),
    [
        pytest.param(80, hardware.SMALL, DESK[0], id="desk, the rule"),
        pytest.param(80, hardware.SMALL, DESK[1], id="desk, others"),
        pytest.param(80, hardware.AMPERE, ["crowded rule 128", "rule 256", "channel rule 256"], id="A100"),
        pytest.param(80, hardware.SMALL, PRODUCTS, id="desk, several writes"),
        pytest.param(80, hardware.AMPERE, ["three writes 256", "crowded four writes 128"], id="A100, several writes"),
        pytest.param(100, hardware.AMPERE, ["rule 128"], id="B200"),
        pytest.param(100, hardware.AMPERE, ["two writes 128"], id="B200, several writes"),
        pytest.param(80, hardware.AMPERE, FEW, id="A100, few tokens"),
        pytest.param(100, hardware.AMPERE, FEW, id="B200, few tokens"),
        pytest.param(80, hardware.SMALL, STEPS + LINEAR_STEPS + FEW, id="desk, steps"),
        pytest.param(90, hardware.HOPPER, STEPS + LINEAR_STEPS + FEW, id="H200, steps"),
    ],
)
def test_kernels_compile_and_fit(capability: int, room: int, calls: list[str]) -> None:
    """GPUs for desks, sm_86 to sm_121, have the products of sm_80, and no more shared memory than `SMALL`."""
    found = printed("compile_portable.py", capability, room, *calls)
    assert {call for call, _, _ in found} == set(calls)
    assert [x for x in found if x[2] > room] == []


@pytest.mark.slow
@pytest.mark.parametrize(("K", "V"), [(64, 64), (200, 400)])
def test_float32_does_not_live_on_the_stack(K: int, V: int) -> None:
    """For Hopper. Where ptxas finds more than fits in all registers it may give a thread 32, and 6 to 25 thousand bytes of stack."""
    found = printed("compile_stack.py", K, V)
    scans = {f"delta_rule.portable_scan.{name}_kernel" for name in ("output", "states", "summary", "backward", "backward_summary")}
    assert {name for name, _, _ in found} > scans | {"delta_rule.portable_prepare.pair_kernel", "delta_channel.portable_scan.states_kernel"}
    assert [x for x in found if x[2] > 6000 or (x[1] <= 32 and x[2])] == []
