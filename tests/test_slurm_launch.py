"""What a process finds out about its job step from the environment that srun gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmoco.distributed.launch import Launch, find_launch
from fastmoco.distributed.slurm import expand_counts, expand_hosts
from fastmoco.errors import UserError

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "localhost,n[7-9]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login1", "login1"),
        ("gpu[01-03,7],login1", "gpu01 gpu02 gpu03 gpu7 login1"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("a[098-101]-ib,b[2]", "a098-ib a099-ib a100-ib a101-ib b2"),
        ("r[1-2]n[0,4]", "r1n0 r1n4 r2n0 r2n4"),
        ("a,b.example.org", "a b.example.org"),
    ],
)
def test_host_lists(text: str, names: str) -> None:
    assert expand_hosts(text) == names.split()


@pytest.mark.parametrize("text", ["", "a,,b", "n[1-", "n1]", "n[3-1]", "n[a-b]", "n[]", "n[1,]", "n 1"])
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(UserError, match=r"host list .* cannot be read"):
        expand_hosts(text)


def test_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE=2x3"):
        expand_counts("2x3")


def test_a_step_meets_at_its_first_node() -> None:
    launch = find_launch(STEP)
    assert launch == Launch("srun", 5, 7, 1, 2, "localhost", 19711)
    assert find_launch(STEP | {"SLURM_NODEID": "3", "SLURM_PROCID": "6", "SLURM_LOCALID": "0"}).local_size == 1
    # Another step of the job may still hold the port.
    assert find_launch(STEP | {"SLURM_STEP_ID": "1"}).port not in (launch.port, launch.port + 1)
    for job in (1, 14_999, 15_000, 2**26):
        assert 15_000 <= find_launch(STEP | {"SLURM_JOB_ID": str(job)}).port < 30_000


def test_what_is_set_is_taken() -> None:
    named = find_launch(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (named.address, named.port) == ("10.0.0.1", 1234)
    # Without it the list would have to be read.
    assert find_launch(STEP | {"MASTER_ADDR": "10.0.0.1", "SLURM_STEP_NODELIST": "n["}).address == "10.0.0.1"


def test_torchrun_within_a_step_goes_before_it() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(UserError, match="started by torchrun without MASTER_ADDR and MASTER_PORT: set"):
        find_launch(STEP | torchrun)
    found = find_launch(STEP | torchrun | {"MASTER_ADDR": "n0", "MASTER_PORT": "1234"})
    assert found == Launch("torchrun", 3, 4, 1, 2, "n0", 1234)


def test_one_task_is_alone() -> None:
    assert find_launch(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Launch("alone")
    batch_script = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}
    assert find_launch(batch_script) == Launch("alone")


def test_a_name_that_the_network_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = STEP | {"SLURM_STEP_NODELIST": "nowhere[3-4].invalid"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere3\.invalid, has no address .* set MASTER_ADDR"):
        find_launch(step)
    scontrol = tmp_path / "scontrol"
    answer = '[ "$*" = "show node nowhere3.invalid" ] && echo "NodeName=n NodeAddr=10.1.2.3 Port=1"'
    scontrol.write_text(f"#!/bin/sh\n{answer}\n")
    scontrol.chmod(0o755)
    assert find_launch(step).address == "10.1.2.3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": "n[3-"}, "cannot be read"),
        ({"SLURM_PROCID": "first"}, "SLURM_PROCID=first .* not a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ],
)
def test_an_environment_that_is_wrong(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_launch(STEP | changes)
