"""The storage service: chunks and their replicas."""
