"""Hosts whose network fails in a run of several processes. `make test-system`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge import INTERFACE, Bridge
from fastmoco.distributed.monitor import OTHER_FAILED
from faults import checkpoints, command, losses, step_of
from runs import draw_images
from worlds import free_port

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"), 48)


@pytest.mark.parametrize("how", ["down", "unplugged"])
def test_two_hosts_cut_apart_both_end_and_go_on_later(
    images: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    args = [sys.executable, "-m", "fastmoco.cli", *command(images, out, "--watchdog", "20", "--steps", "15")]
    with Bridge(2) as bridge:

        def start() -> list[subprocess.Popen[str]]:
            port = str(free_port())
            common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": bridge.addresses[0], "MASTER_PORT": port}
            common |= {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
            return [
                subprocess.Popen(
                    bridge.command(rank, *args), env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True,
                )
                for rank in (0, 1)
            ]  # fmt: skip

        ranks = start()
        try:
            while not checkpoints(out):
                assert all(rank.poll() is None for rank in ranks), [rank.communicate()[0] for rank in ranks]
                time.sleep(0.01)
            (bridge.take_down if how == "down" else bridge.unplug)(1)
            cut = time.monotonic()
            took = []
            said = []
            for rank in ranks:
                said.append(rank.communicate(timeout=30)[0])
                took.append(time.monotonic() - cut)
            with capsys.disabled():
                print(f"\n{how}: ended after {took[0]:.1f} and {took[1]:.1f} s")
            assert max(took) < 20
            for number in (0, 1):
                other = bridge.namespaces[1 - number]
                assert ranks[number].returncode == OTHER_FAILED, said[number]
                assert f"error: rank {1 - number} on {other} (pid " in said[number]
                assert "can no longer be reached after step" in said[number]
                assert "Traceback" not in said[number]
            bridge.restore(1)
            begun = step_of(checkpoints(out)[-1])
            ranks = start()
            said = [rank.communicate(timeout=300)[0] for rank in ranks]
            assert [rank.returncode for rank in ranks] == [0, 0], said
            assert f"going on from step {begun}\n" in said[0]
            assert [row["step"] for row in losses(out)] == list(range(1, 16))
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
