"""KV blocks of inference engines, spilled to and fetched from an emberfs cluster."""
