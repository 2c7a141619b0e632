"""Mount points: what is refused, with which sentence, and what a dead daemon leaves behind."""

import contextlib
import os
import signal

import pytest

from emberfs.client import mountpoint
from emberfs.proto.errors import EmberfsError
from semantics.mounting import mounted, needs_fuse

pytestmark = needs_fuse


def refusal(path) -> str:
    with pytest.raises(EmberfsError) as caught:
        mountpoint.prepare(str(path))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_empty_directory_is_fine(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    os.symlink("m", tmp_path / "link")
    assert mountpoint.prepare(str(tmp_path / "m")) == str(tmp_path / "m")
    assert mountpoint.prepare(str(tmp_path / "link")) == str(tmp_path / "m")


def test_missing_directory(tmp_path) -> None:
    message = refusal(tmp_path / "none")
    assert "no such directory" in message
    assert "mkdir -p" in message


def test_not_a_directory(tmp_path) -> None:
    (tmp_path / "f").write_text("")
    assert "not a directory" in refusal(tmp_path / "f")


def test_not_empty(tmp_path) -> None:
    (tmp_path / "something").write_text("")
    message = refusal(tmp_path)
    assert "not empty" in message
    assert "something" in message


def test_missing_device(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mountpoint, "DEVICE", tmp_path / "fuse")
    assert "modprobe fuse" in refusal(tmp_path)


def test_missing_fusermount(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install fuse3" in refusal(tmp_path)


def test_mounted_by_a_live_daemon(tmp_path) -> None:
    with mounted(tmp_path / "m m") as daemon:
        message = refusal(daemon.place)
        assert "mounted here already" in message
        assert mountpoint.mount_at(str(daemon.place)) is not None
        assert daemon.stop() == 0
    assert mountpoint.mount_at(str(daemon.place)) is None


def test_r9_mount_of_a_killed_daemon_is_cleaned(tmp_path) -> None:
    """The dead mount of a killed daemon is cleaned before mounting anew."""
    with mounted(tmp_path / "m") as daemon:
        (daemon.place / "f").write_text("x")
        daemon.kill()
        with pytest.raises(OSError, match="not connected"):
            os.stat(daemon.place)
        assert mountpoint.is_dead(str(daemon.place))
        assert mountpoint.prepare(str(daemon.place)) == str(daemon.place)
        assert mountpoint.mount_at(str(daemon.place)) is None
        with mounted(daemon.place) as again:
            assert os.listdir(again.place) == []


def test_dead_mount_that_is_in_use_is_cleaned(tmp_path) -> None:
    with mounted(tmp_path / "m") as daemon:
        (daemon.place / "f").write_text("x")
        held = os.open(daemon.place / "f", os.O_RDONLY)
        daemon.kill()
        try:
            mountpoint.prepare(str(daemon.place))
        finally:
            with contextlib.suppress(OSError):
                os.close(held)


def test_o4_o15_hanging_daemon_does_not_hang_us(tmp_path, monkeypatch) -> None:
    """A mount whose daemon hangs is recognised without hanging oneself."""
    monkeypatch.setattr(mountpoint, "_PROBE_TIMEOUT_S", 0.3)
    with mounted(tmp_path / "m") as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        assert "does not answer" in refusal(daemon.place)
        daemon.process.send_signal(signal.SIGCONT)


def test_busy_mount_needs_lazy(tmp_path) -> None:
    with mounted(tmp_path / "m") as daemon:
        (daemon.place / "f").write_text("x")
        held = os.open(daemon.place / "f", os.O_RDONLY)
        assert not mountpoint.unmount(str(daemon.place))
        assert mountpoint.unmount(str(daemon.place), lazy=True)
        assert mountpoint.mount_at(str(daemon.place)) is None
        os.close(held)
        assert daemon.wait() == 0  # it notices that it is not needed any more


def test_unmounting_nothing_is_fine(tmp_path) -> None:
    assert mountpoint.unmount(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_kernel_limits_are_raised(tmp_path) -> None:
    with mounted(tmp_path / "m") as daemon:
        mount = mountpoint.mount_at(str(daemon.place))
        assert mount is not None
        assert mount.kind == "fuse.emberfs"
        with open(f"/sys/class/bdi/{mount.device}/read_ahead_kb") as file:
            assert int(file.read()) == 8192
        background = f"/sys/fs/fuse/connections/{mount.device.split(':')[1]}/max_background"
        if os.path.exists(background):
            with open(background) as file:
                assert int(file.read()) == mountpoint.BACKGROUND_MAX
