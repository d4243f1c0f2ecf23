"""What is said where the processes of a run cannot meet, or would share a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from fastmoco.distributed.launch import Launch, joined
from fastmoco.errors import UserError


def test_one_gpu_for_several_processes_is_refused() -> None:
    launch = Launch("srun", 1, 4, 1, 2)
    with pytest.raises(UserError, match="cuda:0 is one GPU, and 2 processes of this"), joined("cuda:0", launch=launch):
        raise AssertionError("joined")


@pytest.mark.parametrize(("local_size", "hinted"), [(1, True), (2, False)])
def test_a_group_that_cannot_be_made_is_told_and_left(
    local_size: int, hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def refused(**options: Any) -> None:
        raise RuntimeError("connect to 127.0.1.1: refused")

    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: done.append("made"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    monkeypatch.setattr(dist, "new_group", refused)
    launch = Launch("srun", 1, 2, 0, local_size, "n0", 1234)
    message = r"rank 1 of 2, .* could not meet .* connect to 127\.0\.1\.1"
    with pytest.raises(UserError, match=message) as raised, joined("cpu", launch=launch):
        raise AssertionError("joined")
    assert ("GLOO_SOCKET_IFNAME" in str(raised.value)) == hinted
    assert done == ["made", "left"]
