"""What the Python ecosystem expects of a file system: fsspec, torch. Nothing else imports it."""

import os

# Left to itself, gRPC starts threads in every forked child, which go on with the sockets of the
# parent and crash. It reads this when its first channel is made. See session.py.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
