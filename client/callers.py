"""On whose behalf a FUSE request comes: user, group, and supplementary groups.

The kernel sends uid, gid and pid only; the groups are in /proc/PID/status (proc_pid_status(5)).
"""

from collections import OrderedDict

import pyfuse3

from emberfs.proto.ids import SECOND
from emberfs.proto.meta_calls import Caller
from emberfs.runtime.env import Env

REMEMBER_NS = SECOND  # a process that calls setgroups is seen with its new groups after this
REMEMBERED_MAX = 1024

ROOT = Caller(uid=0, gid=0)


class Callers:
    """Callers of late, so that /proc is not read for every request."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._known: OrderedDict[tuple[int, int, int], tuple[int, Caller]] = OrderedDict()

    def of(self, context: pyfuse3.RequestContext) -> Caller:
        """The caller of a request. Root passes every check, so its groups are not looked up."""
        uid, gid = context.uid, context.gid
        if uid == 0:
            return ROOT if gid == 0 else Caller(uid=0, gid=gid)
        key = (context.pid, uid, gid)
        found = self._known.get(key)
        now_ns = self._env.now_ns()
        if found is not None and now_ns - found[0] < REMEMBER_NS:
            return found[1]
        caller = Caller(uid=uid, gid=gid, groups=_groups(context.pid))
        self._known[key] = (now_ns, caller)
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return caller


def _groups(pid: int) -> tuple[int, ...]:
    """Supplementary groups; none if the process is gone or lives in another pid namespace."""
    try:
        return tuple(sorted(pyfuse3.get_sup_groups(pid)))
    except (OSError, RuntimeError, ValueError):
        return ()
