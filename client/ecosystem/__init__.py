"""What the Python ecosystem expects of a file system: fsspec, torch. Nothing else imports it."""
