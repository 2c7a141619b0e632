"""Servers that are started once, when a test first needs them."""

from unit.kv_engines import etcd, postgres

__all__ = ["etcd", "postgres"]
