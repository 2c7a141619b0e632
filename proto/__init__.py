"""The words every part of emberfs shares: ids, errors, cluster, files, messages."""
