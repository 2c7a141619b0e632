"""Servers that are started once, when a test first needs them; what Hypothesis may not judge."""

from hypothesis import HealthCheck, settings

from unit.kv_engines import etcd, postgres

__all__ = ["etcd", "postgres"]

# How long something takes says more about who else uses the machine than about the test.
settings.register_profile("unit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unit")
