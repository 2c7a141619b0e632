"""Where a path is mounted, for programs that expect mounts at /a/b."""

import os


def get_mount_point(p: str) -> str:
    """Return the first two names of the resolved path: "/a/b" for "/a/b/c/d", unchecked.

    `hf3fs_fuse.io.extract_mount_point` knows where something is mounted.
    """
    return os.sep.join(os.path.realpath(p).split(os.sep)[:3])
