"""Transactional ordered key-value stores."""
