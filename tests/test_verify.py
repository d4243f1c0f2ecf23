"""The check of every image: what DALI is trusted with, what is remembered, what odd files become."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data import verify
from fastmoco.data.dali import dali_installed
from fastmoco.data.dali_check import DaliCheck, agrees, dali_version, may_be_read
from fastmoco.data.decode import decode
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.verdicts import Verdict, VerdictFile

NEEDS_DALI = pytest.mark.skipif(not dali_installed(), reason="no DALI here")
RNG = np.random.default_rng(0)
JPEG = b"\xff\xd8\xff"


def photograph(height: int = 40, width: int = 56) -> Image.Image:
    small = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def load(folder: Path, decoder: str = "dali") -> Manifest:
    return load_manifest(folder, decoder=decoder, progress=False)


def test_how_near_is_near_enough() -> None:
    image = RNG.integers(20, 230, (9, 12, 3), dtype=np.uint8)
    step = image.copy()
    step[::5] += 2
    assert agrees(JPEG, image, image) and agrees(JPEG, image, step)
    assert not agrees(b"\x89PNG", image, step), "what is stored without loss must be equal"
    one = image.copy()
    one[3, 4, 1] += 20
    assert not agrees(JPEG, image, one)
    assert not agrees(JPEG, image, image + np.uint8(1)), "one step off everywhere is a wrong conversion"
    assert not agrees(JPEG, image, image[:, :, ::-1]) and not agrees(JPEG, image, 255 - image)
    assert not agrees(JPEG, image, np.transpose(image, (1, 0, 2)))


def test_what_dali_is_not_asked() -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    assert may_be_read(JPEG, image)
    assert not may_be_read(b"GIF89a", image) and not may_be_read(JPEG, image.astype(np.uint16))
    assert not may_be_read(bytes(128) + b"DICM", image)


@NEEDS_DALI
def test_one_file_that_dali_cannot_decode_spoils_no_other() -> None:
    files = []
    for i in range(16):
        stream = io.BytesIO()
        photograph().save(stream, ("PNG", "JPEG")[i % 2])
        files.append((stream.getvalue(), decode(stream.getvalue(), "x")))
    check = DaliCheck(16)
    assert check.agreed(files) == [True] * 16 and check.agreed([]) == []
    broken = list(files)
    broken[5] = files[5][0][:300], files[5][1]
    broken[11] = b"no image", files[11][1]
    for _ in range(2):
        assert check.agreed(broken) == [i not in (5, 11) for i in range(16)]
    assert check.agreed(files[:3]) == [True] * 3


@NEEDS_DALI
def test_dali_gets_what_it_decodes_right_and_the_host_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(folder / "jpeg.jpg", exif=exif)
    photograph().save(folder / "png.png")
    photograph().save(folder / "gif.gif")
    Image.fromarray(RNG.integers(0, 65536, (9, 12), dtype=np.uint16)).save(folder / "deep.png")
    (folder / "bad.jpg").write_bytes(b"")
    found = load(folder)
    assert {name: bool(dali) for name, dali in zip(found.files, found.dali, strict=True)} == {
        "jpeg.jpg": True, "png.png": True, "gif.gif": False, "deep.png": False,
    }  # fmt: skip
    assert [item.file for item in found.skipped] == ["bad.jpg"]
    assert found.sizes[found.files.index("jpeg.jpg")].tolist() == [56, 40]
    assert not load(folder, "pillow").dali.any()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the check decodes, as it does."""
    names: list[str] = []

    def spy(data: bytes, name: str) -> np.ndarray:
        names.append(name)
        return decode(data, name)

    monkeypatch.setattr(verify, "decode", spy)
    return names


def cache_of(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "fastmoco").glob("*.jsonl")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(40):
        photograph().save(folder / f"{i:02d}.png")
    (folder / "bad.png").write_bytes(b"no")
    return folder


def test_the_cache_is_added_to_and_the_last_line_counts(images: Path, tmp_path: Path, decoded: list[str]) -> None:
    before = load(images, "pillow")
    assert len(decoded) == 41
    first = cache_of(tmp_path).read_bytes()
    photograph(30, 30).save(images / "07.png")
    decoded.clear()
    after = load(images, "pillow")
    assert decoded == ["07.png"] and after.sizes[7].tolist() == [30, 30] and before.sizes[7].tolist() == [40, 56]
    assert cache_of(tmp_path).read_bytes().startswith(first)
    decoded.clear()
    again = load(images, "pillow")
    assert decoded == [] and np.array_equal(again.sizes, after.sizes) and again.skipped == after.skipped


def test_damaged_lines_cost_their_file_only(images: Path, tmp_path: Path, decoded: list[str]) -> None:
    whole = load(images, "pillow")
    path = cache_of(tmp_path)
    lines = [line for line in path.read_bytes().splitlines() if line]
    at = next(i for i, line in enumerate(lines) if json.loads(line)[0] == "05.png")
    lines[at] = lines[at][:-9]
    path.write_bytes(b"\n".join([b"{}", b"[1]", b"\xff\xfe", b"null", *lines[:at], *lines[at + 1 :], lines[at]]))
    decoded.clear()
    assert np.array_equal(load(images, "pillow").sizes, whole.sizes) and decoded == ["05.png"]
    decoded.clear()
    load(images, "pillow")
    assert decoded == [], "what is added after half a line stands on a line of its own"


def test_verdicts_are_as_old_as_their_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = np.array([[5, 7], [6, 8], [9, 9]])
    files = ["a", "b", "c"]
    kept = VerdictFile(tmp_path)
    verdicts = [Verdict(3, 4, True), Verdict(reason="broken"), Verdict(reason="no memory", passing=True)]
    kept.add(zip(files, stamps, verdicts, strict=True))
    assert VerdictFile(tmp_path).find(files, stamps) == {0: verdicts[0], 1: verdicts[1]}
    assert VerdictFile(tmp_path).find(["b", "a"], stamps[[1, 2]]) == {0: verdicts[1]}, "a is not what it was"
    monkeypatch.setattr(kept, "_dali", "another")
    assert kept.find(files, stamps)[0] == Verdict(3, 4, None), "the size still holds"
    monkeypatch.setattr(kept, "_host", "another")
    assert set(kept.find(files, stamps)) == {0}, "a newer decoder may read b"


@NEEDS_DALI
def test_dali_is_asked_when_it_was_not_before(images: Path, decoded: list[str]) -> None:
    assert dali_version()
    load(images, "pillow")
    decoded.clear()
    assert load(images, "dali").dali.all() and len(decoded) == 40, "all but the one that does not decode"
    decoded.clear()
    assert load(images, "dali").dali.all() and decoded == []


def test_an_interrupted_check_keeps_what_it_found(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def interrupted(data: bytes, name: str) -> np.ndarray:
        names.append(name)
        if name == "39.png":
            raise KeyboardInterrupt
        return decode(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(images, "pillow")
        assert len(names) == 40
        names.clear()
        with pytest.raises(KeyboardInterrupt):
            load(images, "pillow")
    assert 0 < len(names) < 20, "only the last files are checked again"


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load(images, "pillow")) == 40
    assert capsys.readouterr().out.count("will be checked again next time") == 1


class Watched(np.ndarray):
    """Pixels that are counted as long as something holds them."""

    alive = 0

    def __array_finalize__(self, obj: object) -> None:
        Watched.alive += 1

    def __del__(self) -> None:
        Watched.alive -= 1


@pytest.mark.parametrize(("decoder", "held", "groups"), [("pillow", 10, []), ("dali", 5000, [4, 4, 4, 4]),
                                                         ("dali", 1000, [1] * 16), ("dali", 10**6, [16])])  # fmt: skip
def test_no_more_pixels_are_held_than_are_needed(
    images: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, held: int, groups: list[int]
) -> None:
    asked: list[int] = []
    peak = [0]

    def small(data: bytes, name: str) -> np.ndarray:
        pixels = np.zeros((20, 20, 3), dtype=np.uint8).view(Watched)
        peak[0] = max(peak[0], Watched.alive)
        return pixels

    class Asked:
        """Stands for DALI, which agrees with everything."""

        def __init__(self, batch: int) -> None:
            assert batch == 16

        def agreed(self, files: list[tuple[bytes, np.ndarray]]) -> list[bool]:
            asked.append(len(files))
            return [True] * len(files)

    monkeypatch.setattr(verify, "decode", small)
    monkeypatch.setattr(verify, "DaliCheck", Asked)
    monkeypatch.setattr(verify, "_HELD_BYTES", held)
    for path in sorted(images.iterdir())[16:]:
        path.unlink()
    found = load_manifest(images, decoder=decoder, workers=1, progress=False)
    assert len(found) == 16 and found.sizes.tolist() == [[20, 20]] * 16 and found.dali.all() == (decoder == "dali")
    assert asked == groups
    # The one that was just decoded, beside those that wait or the last one's.
    assert 0 < peak[0] <= max(groups, default=1) + 1
