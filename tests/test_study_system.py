"""A tiny study as its users run it: killed and started again, and its report in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from fastmoco.study.report.blocks import Listing, Table
from fastmoco.study.report.page import to_html
from studies import draw_study

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[1]
# What the browser asks of its maker by itself, whatever page it shows.
_OF_THE_BROWSER = ("google.com", "googleapis.com", "gvt1.com")
# Measures the page in a frame as wide as a phone. The page itself may run nothing.
_PHONE = """<!DOCTYPE html><iframe id="page" style="width:390px;height:800px;border:0" src="{source}"></iframe>
<pre id="measured"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument;
  const width = (part) => Math.round(part.getBoundingClientRect().width);
  const measured = {{
    page: page.documentElement.scrollWidth,
    pictures: [...page.querySelectorAll("figure")].map((part) => [part.id, width(part.querySelector("svg"))]),
    tables: [...page.querySelectorAll("table")].map((part) => [part.caption.textContent, part.rows.length]),
    boxes: [...page.querySelectorAll("table")].map((part) => width(part.parentElement)),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((part) => part.name),
  }};
  document.getElementById("measured").textContent = JSON.stringify(measured);
}};
</script>"""


def start(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastmoco", "study", str(file), "--jobs", "2"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that ran to its end."""
    file = draw_study(tmp_path_factory.mktemp("undisturbed"))
    process = start(file)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    return file.parent


def without_times(folder: Path) -> str:
    """The report less what ran where and how long."""
    text = (folder / "out" / "report" / "report.md").read_text()
    text = re.sub(r"(?s)## What ran where, and how long.*?(?=## Commands)", "", text)
    return re.sub(r"\(\d+\.\d s\)", "", text)


def test_killed_at_random_it_writes_the_same_report(undisturbed: Path, tmp_path: Path) -> None:
    file = draw_study(tmp_path)
    rng = np.random.default_rng(3)
    cells = file.parent / "out" / "cells"
    killed = 0
    for _ in range(3):
        process = start(file)
        # Once it has computed something, at any moment.
        before = len(list(cells.glob("*.json")))
        end = time.monotonic() + 300
        while process.poll() is None and len(list(cells.glob("*.json"))) <= before and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0.0, 6.0)))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert killed, "it was never killed in the middle"
    process = start(file)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    assert without_times(tmp_path) == without_times(undisturbed)
    for name in ("drawn-labels-full.png", "drawn-pretraining.png", "drawn-reuse.png"):
        assert (tmp_path / "out" / "report" / name).read_bytes() == (
            undisturbed / "out" / "report" / name
        ).read_bytes()


def browse(page: Path, folder: Path) -> tuple[str, list[str], set[str]]:
    """The page as chromium made it, its console's lines, and the hosts that anything was asked of."""
    log = folder / "net.json"
    found = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files", "--virtual-time-budget=10000", "--enable-logging=stderr",
            f"--log-net-log={log}", "--window-size=420,900", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    console = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r'"url":"((?:https?|wss?):[^"]*)"', log.read_text())}
    return found.stdout, console, {host for host in hosts if not host.endswith(_OF_THE_BROWSER)}


def measured(source: Path, folder: Path) -> tuple[dict, list[str], set[str]]:
    wrapper = folder / "phone.html"
    wrapper.write_text(_PHONE.format(source=source.as_uri()))
    dom, console, hosts = browse(wrapper, folder)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None and found[1], dom[-500:]
    return json.loads(found[1]), console, hosts


@pytest.fixture
def browser() -> None:
    """That there is one."""
    if shutil.which("chromium") is None:
        reason = "chromium is not installed (Debian: apt install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.usefixtures("browser")
def test_the_report_opens_in_a_browser_on_a_phone_and_asks_nothing_of_anyone(
    undisturbed: Path, tmp_path: Path
) -> None:
    page = undisturbed / "out" / "report" / "report.html"
    found, console, hosts = measured(page, tmp_path)
    assert console == [] and hosts == set() and found["fetched"] == []
    text = page.read_text()
    assert [name for name, _ in found["pictures"]] == re.findall(r'<figure id="([^"]+)"', text)
    assert len(found["pictures"]) > 10 and all(200 < width <= 390 for _, width in found["pictures"])
    assert len(found["tables"]) == text.count("<table>") > 15
    assert all(rows > 1 for _, rows in found["tables"])
    # Wide tables scroll in their boxes; the page does not.
    assert found["page"] <= 390 and all(width <= 390 for width in found["boxes"])


@pytest.mark.usefixtures("browser")
def test_a_page_that_does_ask_and_does_err_is_seen_to(tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    planted.write_text(
        '<!DOCTYPE html><p style="width:900px">wide</p><img src="http://planted.invalid/picture.png">'
        "<script>console.error('planted')</script>"
    )
    found, console, hosts = measured(planted, tmp_path)
    assert any("planted" in line for line in console)
    assert hosts == {"planted.invalid"} and found["fetched"] == ["http://planted.invalid/picture.png"]
    assert found["page"] > 390


def printed(page: Path, folder: Path) -> int:
    """How many pages it fills on paper."""
    paper = folder / "report.pdf"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         f"--user-data-dir={folder / 'profile'}", f"--print-to-pdf={paper}", page.as_uri()],
        capture_output=True, timeout=180, check=True,
    )  # fmt: skip
    assert paper.read_bytes()[:5] == b"%PDF-"
    return len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))


@pytest.mark.usefixtures("browser")
def test_it_prints(undisturbed: Path, tmp_path: Path) -> None:
    assert printed(undisturbed / "out" / "report" / "report.html", tmp_path) > 5


@pytest.mark.usefixtures("browser")
def test_what_is_folded_is_open_in_print(tmp_path: Path) -> None:
    lines = tuple(f"line {number}" for number in range(300))
    table = Table(caption="c", header=("a", "b"), rows=tuple((line, "1") for line in lines), summary="300 rows")
    pages = {}
    for name, block in (("list", Listing(items=lines, summary="300 lines", folded=True)), ("table", table)):
        text = to_html("t", [block])
        for kind, page in ((name, text), (f"{name} shut", text.replace("details::details-content", "none"))):
            (tmp_path / "page.html").write_text(page)
            pages[kind] = printed(tmp_path / "page.html", tmp_path)
    assert pages["list shut"] == pages["table shut"] == 1
    assert pages["list"] > 3 and pages["table"] > 3
