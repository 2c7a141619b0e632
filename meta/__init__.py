"""The metadata service: names and attributes over a transactional store."""
