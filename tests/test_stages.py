"""Work in stages that nobody interrupts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from qwenvl_mlx.layers import stages
from qwenvl_mlx.layers.stages import Stages, finish


@pytest.mark.parametrize(("device", "at_once"), [(mx.cpu, True), (mx.gpu, False)])
def test_a_cpu_computes_each_stage_before_the_next_one_is_begun(
    device: Any, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: device)
    computed: list[mx.array] = []
    monkeypatch.setattr(stages.mx, "eval", computed.append)
    made: list[mx.array] = []

    def work() -> Stages[int]:
        for number in range(3):
            assert len(computed) == (number if at_once else 0)
            made.append(mx.array(number))
            yield made[-1]
        return 7

    assert finish(work()) == 7
    assert [id(one) for one in computed] == [id(one) for one in made if at_once]
