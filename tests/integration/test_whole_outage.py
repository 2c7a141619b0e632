"""Every service is gone, the mount is not."""

import time

from integration.harness import LocalCluster


def test_r7_up_does_not_wait_for_the_mount_that_waits_for_it(fresh: LocalCluster) -> None:
    """With every service dead and the mount alive, `up` starts them at once."""
    for name in fresh.plan.service_names():
        fresh.kill(name)
    time.sleep(1.5)  # the kernel has forgotten the attributes of the mount point
    began = time.monotonic()
    fresh.up()
    took_s = time.monotonic() - began
    fresh.wait_serving()
    assert "clean:" in fresh.fsck()
    assert took_s < 40  # it stood still for the 60 s of the mount's request deadline
