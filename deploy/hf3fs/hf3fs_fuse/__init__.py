"""The Python interface that programs of 3FS use for batched I/O, on an emberfs mount."""
