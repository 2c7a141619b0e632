"""The zero-copy native API: rings and memory that applications share with the client daemon."""
