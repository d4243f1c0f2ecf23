"""Two processes on real images train as one does, under every engine. `make test-system`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.engines import ENGINES, EnginesArgs, main
from bench.engines_rank import METHODS

pytestmark = pytest.mark.system


def test_every_engine_keeps_to_one_process(
    real_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Half as many as the page has: what an engine does otherwise shows at the second.
    args = EnginesArgs(data=real_data("idrid_fundus_256"), out=tmp_path / "engines.md", steps=15)
    status = main(args)
    said = capsys.readouterr()
    with capsys.disabled():
        print(f"\n{said.out}")
    assert status == 0, said.out + said.err
    assert said.out.count(": holds") == len(ENGINES) * len(METHODS)
    assert "| DeepSpeed, ZeRO 3 | barlow |" in args.out.read_text()  # type: ignore[union-attr]
